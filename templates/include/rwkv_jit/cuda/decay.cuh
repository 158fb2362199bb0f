#pragma once
// The gate: what w means, and its slope.
#include <cstdint>

#include "rwkv_jit/layout.h"

namespace rwkv_jit {

// A token's decay factor for one key channel: d + rest, where rest is what rounding takes from a
// factor near 1. slope is dd/dw.
struct Decay {
  float d, rest, slope;
};

__device__ __forceinline__ Decay split_decay(float d, float less_one, float slope) {
  if (less_one < -0.5f) return {d, 0.0f, slope};
  d = 1.0f + less_one;
  return {d, less_one - (d - 1.0f), slope};
}

// The factor to multiply by, one token after the other. What rounding takes from one goes into the
// next, so that over any number of tokens the error stays that of a few roundings.
__device__ __forceinline__ float carry_rest(const Decay& decay, float& carry) {
  const float rest = decay.rest + carry, d = decay.d + rest;
  const bool near_one = !(decay.d < 0.5f);
  carry = near_one ? rest - (d - decay.d) : 0.0f;
  return near_one ? d : decay.d;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

template <DecayKind KIND>
__device__ __forceinline__ Decay decay_of(float w) {
  if constexpr (KIND == FACTOR) return split_decay(w, w - 1.0f, 1.0f);
  float log_d = w, log_slope = 1.0f;  // log_slope is dlog d / dw
  if constexpr (KIND == LOGLOG) {
    log_d = -expf(w);
  } else if constexpr (KIND == LOGIT) {
    const float gate = sigmoid(w);
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
