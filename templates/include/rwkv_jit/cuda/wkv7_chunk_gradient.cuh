#pragma once
// Gradients of one chunk of wkv7, sixteen of its channels to a warp, from its state S0, the
// gradient D of the state after it, and the gradients of the four triangles.
#include "rwkv_jit/cuda/wkv7_chunk.cuh"

namespace rwkv_jit {

// dlog d / dw, from log2 d.
template <DecayKind KIND>
__device__ __forceinline__ float decay_slope(float log2_d) {
  if constexpr (KIND == LOG) return 1.0f;
  const float log_d = log2_d * (1.0f / LOG2_E);
  return KIND == LOGLOG ? log_d : log_d * (1.0f + log_d * (1.0f / 0.60653065971263342f));
}

// Sums from the last token back: upper are rows 0..7, lower rows 8..15, one a lane.
__device__ __forceinline__ void running_sum_back(float& upper, float& lower) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    const float above = __shfl_down_sync(0xffffffffu, upper, step);
    const float below = __shfl_down_sync(0xffffffffu, lower, step);
    upper += lane + step < 32 ? above : 0.0f;
    lower += lane + step < 32 ? below : 0.0f;
  }
  upper += __shfl_sync(0xffffffffu, lower, lane % 4);
}

// Writes a gradient [token, channel] of such pairs.
__device__ __forceinline__ void store_pairs(const Accumulator (&values)[2], void* to, int64_t at,
                                            int token_stride, const bool (&valid)[2]) {
  bf16* first = static_cast<bf16*>(to) + at;
#pragma unroll
  for (int part = 0; part < 4; ++part)
    if (valid[part % 2])
      *reinterpret_cast<uint32_t*>(first + part % 2 * 8 * token_stride + part / 2 * 8) =
          pack(values[part / 2][part % 2 * 2], values[part / 2][part % 2 * 2 + 1]);
}
__device__ __forceinline__ void store_wide_pairs(const Accumulator (&values)[2], void* to,
                                                 int64_t at, int token_stride,
                                                 const bool (&valid)[2]) {
  float* first = static_cast<float*>(to) + at;
#pragma unroll
  for (int part = 0; part < 4; ++part)
    if (valid[part % 2])
      *reinterpret_cast<float2*>(first + part % 2 * 8 * token_stride + part / 2 * 8) =
          make_float2(values[part / 2][part % 2 * 2], values[part / 2][part % 2 * 2 + 1]);
}

// Sixteen channels of a chunk's tensors, [token, channel].
struct Loaded {
  OperandA r, k, a, b, w;

  __device__ __forceinline__ void load_from(const Raw& raw, int channel) {
    load<ROW>(&raw.r[0][channel], r);
    load<ROW>(&raw.k[0][channel], k);
    load<ROW>(&raw.a[0][channel], a);
    load<ROW>(&raw.b[0][channel], b);
    load<ROW>(&raw.w[0][channel], w);
  }

  // log2 of the decay factors, 0 for tokens that are not there. A w of float32 is read from its
  // place in memory.
  template <DecayKind KIND, bool BOUNDED>
  __device__ __forceinline__ void log2_decays(const float* wide, int token_stride,
                                              const bool (&valid)[2],
                                              Accumulator (&log_d)[2]) const {
    if (wide == nullptr) {
      widen(w, log_d);
    } else {
#pragma unroll
      for (int part = 0; part < 4; ++part) {
        float2 pair = make_float2(0.0f, 0.0f);
        if (valid[part % 2])
          pair = __ldg(
              reinterpret_cast<const float2*>(wide + part % 2 * 8 * token_stride + part / 2 * 8));
        log_d[part / 2][part % 2 * 2] = pair.x;
        log_d[part / 2][part % 2 * 2 + 1] = pair.y;
      }
    }
#pragma unroll
    for (int at = 0; at < 8; ++at) {
      float& x = log_d[at / 4][at % 4];
      x = valid[at / 2 % 2] ? log2_decay<KIND, BOUNDED>(x) : 0.0f;
    }
  }
};

// Gradients times factors, and others added, elementwise.
__device__ __forceinline__ void scale(Accumulator (&gradient)[2], const Accumulator (&factors)[2]) {
#pragma unroll
  for (int at = 0; at < 8; ++at) gradient[at / 4][at % 4] *= factors[at / 4][at % 4];
}
__device__ __forceinline__ void scale_and_add(Accumulator (&gradient)[2],
                                              const Accumulator (&factors)[2],
                                              const Accumulator (&others)[2]) {
#pragma unroll
  for (int at = 0; at < 8; ++at)
    gradient[at / 4][at % 4] =
        fmaf(gradient[at / 4][at % 4], factors[at / 4][at % 4], others[at / 4][at % 4]);
}

// sum += rows * gradients (or less them), elementwise.
template <bool MINUS = false>
__device__ __forceinline__ void add_overlap(const OperandA& rows, const Accumulator (&gradient)[2],
                                            Accumulator (&sum)[2]) {
  Accumulator wide[2];
  widen(rows, wide);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int at = 0; at < 4; ++at)
      sum[tile][at] =
          fmaf(MINUS ? -wide[tile][at] : wide[tile][at], gradient[tile][at], sum[tile][at]);
}

}  // namespace rwkv_jit
