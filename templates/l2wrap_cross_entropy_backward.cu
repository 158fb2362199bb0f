// Cross entropy backward: one block a token, which reads the token's logits x once.
//   dx_c = dloss (exp(x_c - m - logsum) - [c is the target]) + dmaximum [c is the first maximum]
//% include "launcher.h"
#include "rwkv_jit/cuda/error.h"
#include "rwkv_jit/cuda/row.cuh"
//% include "l2wrap_cross_entropy_cuda.h"
namespace {

__global__ void __launch_bounds__(THREADS) backward(const Arguments args) {
  const int64_t token = blockIdx.x, begin = token * args.C;
  const int64_t target = static_cast<const int64_t*>(args.targets)[token];
  const int64_t argmax = static_cast<const int32_t*>(args.argmax)[token];
  const bool used = target != IGNORED, exists = 0 <= target && target < args.C;
  const float maximum = load_at<float>(args.maximum, token);
  const float logsum = load_at<float>(args.logsum, token);
  const float dloss = exists ? load_at<float>(args.dloss, token) : NOT_A_NUMBER;
  const float dmaximum = load_at<float>(args.dmaximum, token);
  const auto differentiate = [&](int64_t column, auto& x) {
    constexpr int COUNT = sizeof(x) / sizeof(float);
#pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      const float chance = expf((x[i] - maximum) - logsum);
      const float dx = dloss * (column + i == target ? chance - 1.0f : chance);
      x[i] = used ? column + i == argmax ? dx + dmaximum : dx : 0.0f;
    }
    if constexpr (COUNT == 1) {
      store_at<Element>(args.dlogits, begin + column, x[0]);
    } else {
      store_at<Element>(args.dlogits, begin + column, x);
    }
  };
  visit_row<Element, THREADS>(args.logits, begin, args.C, differentiate);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  if (args->B * args->T == 0) return cudaSuccess;
  backward<<<static_cast<unsigned>(args->B * args->T), THREADS, 0,
             static_cast<cudaStream_t>(args->stream)>>>(*args);
  return cudaGetLastError();
}
