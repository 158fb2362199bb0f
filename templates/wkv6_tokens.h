// What the CPU kernels of wkv6 share.
//% include "wkv6_decay.h"

namespace {

// Asks for COUNT values, from `first` on, of a token's row of each of these tensors and of w.
template <int COUNT>
inline void prefetch_tokens(const Arguments& args, std::initializer_list<const void*> tensors,
                            int64_t row, int first) {
  for (const void* tensor : tensors)
    rwkv_jit::prefetch_values<Element, COUNT>(tensor, row * N + first);
  if (DECAY_PER_TOKEN) rwkv_jit::prefetch_values<Element, COUNT>(args.w, row * N + first);
}

}  // namespace
