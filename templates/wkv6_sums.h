// Gradients that are sums over all sequences, of each sequence's part, in their order.
#include "rwkv_jit/sum.h"

namespace {

// One value of a sum [H, N] of parts [S, H, N].
__device__ __forceinline__ float sum_sequences(const Arguments& args, const void* parts,
                                               int64_t at) {
  float sum = 0, rest = 0;
  for (int64_t s = 0; s < args.S; ++s)
    add_long(static_cast<const float*>(parts)[s * args.H * N + at], sum, rest);
  return sum;
}

template <typename Args>
__device__ __forceinline__ void sum_parts(const Args& args, int64_t at) {
  store_mixed<Element>(args.du, args.du_dtype, at, sum_sequences(args, args.du_parts, at));
  if constexpr (!DECAY_PER_TOKEN)
    store_mixed<Element>(args.dw, args.dw_dtype, at, sum_sequences(args, args.dw_parts, at));
}

__global__ void __launch_bounds__(N) sum_kernel(const Arguments args) {
  sum_parts(args, static_cast<int64_t>(blockIdx.x) * N + threadIdx.x);
}

int launch_sums(const Arguments& args) {
  if (args.H == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  sum_kernel<<<static_cast<unsigned>(args.H), N, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace
