#pragma once
// Gradients of one chunk of wkv7, sixteen of its channels to a warp, from its state S0, the
// gradient D of the state after it, and the gradients of the four triangles.
#include "rwkv_jit/cuda/wkv7_chunk.cuh"

namespace rwkv_jit {

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

}  // namespace rwkv_jit
