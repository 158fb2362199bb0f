// The decay of a chunk's tokens on a CPU.
//% include "wkv6_decay.h"

namespace {

constexpr int GATES = DECAY_PER_TOKEN ? L : 1;

inline int gate_at(int t) { return DECAY_PER_TOKEN ? t : 0; }

// Fills keep and change of a chunk, says whether every keep is 1, and calls use(t, x, gate) for
// each vector of them.
template <typename Workspace, typename Use>
inline void load_gates(const Arguments& args, int64_t first, int count, int64_t head,
                       Workspace& work, const Use& use) {
  Vector least_keep = rwkv_jit::splat<Vector>(Real(1));
  for (int t = 0; t < (DECAY_PER_TOKEN ? count : 1); ++t) {
    const int64_t row = decay_row((first + t) * args.H + head, head);
    rwkv_jit::load_mixed_row<Element, N>(args.w, args.w_dtype, row, reals(work.w));
    for (int x = 0; x < VECTORS; ++x) {
      const Gate gate(work.w[x]);
      work.keep[t][x] = gate.keep;
      work.change[t][x] = gate.change;
      least_keep = gate.keep < least_keep ? gate.keep : least_keep;
      use(t, x, gate);
    }
  }
  work.all_keep = true;
  for (int lane = 0; lane < WIDTH; ++lane) work.all_keep &= least_keep[lane] == 1;
}

// Asks for COUNT values, from `first` on, of a token's row of each of these tensors and of w.
template <int COUNT>
inline void prefetch_tokens(const Arguments& args, std::initializer_list<const void*> tensors,
                            int64_t row, int first) {
  for (const void* tensor : tensors)
    rwkv_jit::prefetch_values<Element, COUNT>(tensor, row * N + first);
  if (DECAY_PER_TOKEN) rwkv_jit::prefetch_values<Element, COUNT>(args.w, row * N + first);
}

}  // namespace
