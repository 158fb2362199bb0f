// Which sequence and head a block of a forward has, the longest sequences first.
#include "rwkv_jit/cuda/blocks.h"
#include "rwkv_jit/cuda/longest_first.cuh"
#include "rwkv_jit/states.h"

namespace {

using States = rwkv_jit::States<Arguments>;

// What a block works on, and the index of its state, [row, head], among all.
struct Work {
  rwkv_jit::Sequence sequence;
  int64_t head, state;
  bool done;  // there is nothing left to do
};

// The work of the blocks with this index, of which `sees_to_zeros` one for each head. SPAN: tokens
// between two checkpoints.
template <int SPAN, int THREADS>
__device__ __forceinline__ Work find_work(const Arguments& args, int64_t index,
                                          bool sees_to_zeros = true) {
  const int64_t head = index % args.H, at = index / args.H;
  const int64_t s = args.order == nullptr ? at : static_cast<const int32_t*>(args.order)[at];
  const rwkv_jit::Sequence sequence = rwkv_jit::find_sequence(args, s, SPAN);
  const int64_t row = States::row(args, s);
  const bool done =
      rwkv_jit::only_zeros(args, s, sequence, row, [&](int64_t begin, int64_t end, int64_t step) {
        constexpr int PIECES = N * sizeof(Element) / sizeof(uint4);
        if (!sees_to_zeros) return;
        for (int64_t piece = threadIdx.x;; piece += THREADS) {
          const int64_t token = begin + piece / PIECES * step;
          if (token >= end) break;
          static_cast<uint4*>(args.y)[(token * args.H + head) * PIECES + piece % PIECES] = {};
        }
      });
  return {sequence, head, row * args.H + head, done};
}

// Does what comes before the `blocks` of a forward, of which `at_once` share a multiprocessor, and
// returns what they are to be told. Only where some wait does it matter which are first.
inline Arguments begin_forward(const Arguments& given, int64_t blocks, int at_once) {
  Arguments args = given;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  if (args.cu_seqlens == nullptr || blocks <= rwkv_jit::blocks_at_once(at_once))
    args.order = nullptr;
  if (args.order != nullptr)
    rwkv_jit::order_kernel<<<1, rwkv_jit::ORDER_THREADS, 0, stream>>>(args);
  // Tokens without a sequence, and so without a block that sees to them.
  if (States::IN_POOL && args.S == 0 && args.cu_seqlens != nullptr)
    cudaMemsetAsync(args.y, 0, args.T * args.H * N * sizeof(Element), stream);
  return args;
}

}  // namespace
