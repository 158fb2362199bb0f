// Cross entropy forward: one block a token, which reads the token's logits x once.
//   m = max_c x_c,   logsum = log sum_c exp(x_c - m),   loss = logsum + (m - x_target)
//% include "launcher.h"
#include "rwkv_jit/cuda/error.h"
#include "rwkv_jit/cuda/row.cuh"
//% include "l2wrap_cross_entropy_cuda.h"
namespace {

constexpr int WARPS = THREADS / 32;
constexpr float INFINITE = __builtin_huge_valf();

// The largest of some logits, the first place that has it, and the sum of all exp(x - largest).
struct Partial {
  float largest, sum;
  int at;
};

// What is subtracted from logits; there is nothing to subtract while all are -inf.
__device__ __forceinline__ float finite_base(float largest) {
  return largest == -INFINITE ? 0.0f : largest;
}

template <int COUNT>
__device__ __forceinline__ void add(Partial& to, int64_t column, const float (&x)[COUNT]) {
  float top = x[0];
  int at = 0;
#pragma unroll
  for (int i = 1; i < COUNT; ++i) {
    at = x[i] > top ? i : at;
    top = fmaxf(top, x[i]);
  }
  if (top > to.largest) {
    to.sum *= expf(to.largest - top);
    to.largest = top;
    to.at = static_cast<int>(column) + at;
  }
  const float base = finite_base(to.largest);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) to.sum += expf(x[i] - base);
}

__device__ __forceinline__ Partial merged(const Partial& left, const Partial& right) {
  const float largest = fmaxf(left.largest, right.largest), base = finite_base(largest);
  const float sum = left.sum * expf(left.largest - base) + right.sum * expf(right.largest - base);
  if (left.largest == right.largest) return {largest, sum, min(left.at, right.at)};
  return {largest, sum, left.largest > right.largest ? left.at : right.at};
}

__device__ __forceinline__ Partial merged_block(Partial mine) {
  __shared__ Partial of_warps[WARPS];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    const Partial other = {__shfl_xor_sync(~0u, mine.largest, step),
                           __shfl_xor_sync(~0u, mine.sum, step),
                           __shfl_xor_sync(~0u, mine.at, step)};
    // The lower lane on the left in both, so that all lanes have the same bits.
    mine = threadIdx.x & step ? merged(other, mine) : merged(mine, other);
  }
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = mine;
  __syncthreads();
  mine = of_warps[0];
  for (int warp = 1; warp < WARPS; ++warp) mine = merged(mine, of_warps[warp]);
  return mine;
}

__global__ void __launch_bounds__(THREADS) forward(const Arguments args) {
  const int64_t token = blockIdx.x, begin = token * args.C;
  const int64_t target = static_cast<const int64_t*>(args.targets)[token];
  Partial mine = {-INFINITE, 0.0f, 0};
  if (target != IGNORED) {
    visit_row<Element, THREADS>(args.logits, begin, args.C,
                                [&](int64_t column, const auto& x) { add(mine, column, x); });
  }
  mine = merged_block(mine);
  if (threadIdx.x > 0) return;
  float loss = 0.0f, logsum = 0.0f;
  if (target == IGNORED) {
    mine.largest = 0.0f;
  } else {
    logsum = logf(mine.sum);
    const bool exists = 0 <= target && target < args.C;
    loss = exists ? logsum + (mine.largest - load_at<Element>(args.logits, begin + target))
                  : NOT_A_NUMBER;
  }
  store_at<float>(args.loss, token, loss);
  store_at<float>(args.maximum, token, mine.largest);
  store_at<float>(args.logsum, token, logsum);
  static_cast<int32_t*>(args.argmax)[token] = mine.at;
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  if (args->B * args->T == 0) return cudaSuccess;
  forward<<<static_cast<unsigned>(args->B * args->T), THREADS, 0,
            static_cast<cudaStream_t>(args->stream)>>>(*args);
  return cudaGetLastError();
}
