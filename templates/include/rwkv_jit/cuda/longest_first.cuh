#pragma once
// An order of packed sequences in which the longest comes first, so that no long one begins when
// the others are nearly done. Lengths count as equal within an eighth of an octave. The order is
// the same from run to run, and changes no result.
#include "rwkv_jit/layout.h"

namespace rwkv_jit {

constexpr int ORDER_THREADS = 256, LENGTHS = 256;

// The longer, the lower: eight for each power of two, and the last for none at all.
__device__ __forceinline__ int length_class(int64_t length) {
  const float shown = static_cast<float>(length);
  const int eighths = static_cast<int>(__float_as_uint(shown) >> 20) - (127 << 3) + 1;
  return LENGTHS - 1 - min(max(eighths, 0), LENGTHS - 1);
}

// One block. places: where the next sequence of a class goes.
template <typename Args>
__global__ void __launch_bounds__(ORDER_THREADS) order_kernel(const Args args) {
  __shared__ int counts[LENGTHS], places[LENGTHS];
  const auto class_of = [&](int64_t s) {
    const Sequence sequence = find_sequence(args, s, 1);
    return length_class(sequence.end - sequence.begin);
  };
  static_assert(ORDER_THREADS == LENGTHS);
  counts[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t s = threadIdx.x; s < args.S; s += ORDER_THREADS) atomicAdd(&counts[class_of(s)], 1);
  __syncthreads();
  int before = 0;
  for (int other = 0; other < static_cast<int>(threadIdx.x); ++other) before += counts[other];
  places[threadIdx.x] = before;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  // In their order, 32 at a time.
  const int lane = threadIdx.x;
  for (int64_t first = 0; first < args.S; first += 32) {
    const int64_t s = first + lane;
    const int own = s < args.S ? class_of(s) : LENGTHS;
    const unsigned alike = __match_any_sync(0xffffffffu, own);
    const int rank = __popc(alike & ((1u << lane) - 1));
    if (own < LENGTHS) static_cast<int32_t*>(args.order)[places[own] + rank] = static_cast<int>(s);
    __syncwarp();
    if (own < LENGTHS && rank == 0) places[own] += __popc(alike);
    __syncwarp();
  }
}

}  // namespace rwkv_jit
