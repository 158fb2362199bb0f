#pragma once
// The gate: what w means, and its slope.
#include <cstdint>

#include "rwkv_jit/layout.h"

namespace rwkv_jit {

// A token's decay factor d for one key channel, as keep + change with keep 0 or 1: the state is
// advanced as keep * S + (change * S + ...), which loses no digits of d near 1 or of the rest where
// d is near 0. slope is dd/dw.
struct Decay {
  float keep, change, slope;
};

__device__ __forceinline__ Decay split_decay(float d, float less_one, float slope) {
  const bool near_one = !(less_one < -0.5f);
  return {near_one ? 1.0f : 0.0f, near_one ? less_one : d, slope};
}

template <DecayKind KIND>
__device__ __forceinline__ Decay decay_of(float w) {
  if constexpr (KIND == FACTOR) return split_decay(w, w - 1.0f, 1.0f);
  float log_d = w, log_slope = 1.0f;  // log_slope is dlog d / dw
  if constexpr (KIND == LOGLOG) {
    log_d = -expf(w);
  } else if constexpr (KIND == LOGIT) {
    const float gate = 1.0f / (1.0f + expf(-w));
    log_d = -0.60653065971263342f * gate;  // -exp(-1/2)
    log_slope = log_d * (1.0f - gate);
  }
  // Past this d is 0; finite, so that 0 * log d is 0.
  log_d = log_d < -1e4f ? -1e4f : log_d;
  if constexpr (KIND == LOGLOG) log_slope = log_d;
  const float d = expf(log_d);
  return split_decay(d, expm1f(log_d), d * log_slope);
}

}  // namespace rwkv_jit
