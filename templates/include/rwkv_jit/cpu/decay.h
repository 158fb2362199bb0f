#pragma once
// The gate: what w means, and its slope.
#include <cmath>
#include <cstdint>

#include "rwkv_jit/cpu/element.h"
#include "rwkv_jit/layout.h"

namespace rwkv_jit {

// e^x as scale * (1 + rest), |rest| < 0.42; good to 2 ulp, for both e^x and e^x - 1. Branch-free,
// so that loops over it vectorise. Below the smallest normal number it is zero.
struct Exponential {
  float scale, rest;
};
inline Exponential exponential(float x) {
  const float bounded = x < -88.0f ? -88.0f : x > 89.0f ? 89.0f : x;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float n = (bounded * 1.44269504f + shifter) - shifter;
  float r = bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = r + r * r * p;
  // The exponent is n + 127 in 1..255; 255 is infinity, 0 is zero.
  int32_t exponent = static_cast<int32_t>(n) + 127;
  exponent = x < -87.3f ? 0 : x > 88.7f ? 255 : exponent;
  Exponential result{float_of(static_cast<uint32_t>(exponent) << 23), p};
  result.rest = exponent == 0 ? 0.0f : exponent == 255 ? 1.0f : p;  // no 0 * infinity
  return result;
}

inline float exp_of(float x) {
  const Exponential e = exponential(x);
  return x == x ? e.scale * (1 + e.rest) : x;
}
inline float expm1_of(float x) {
  const Exponential e = exponential(x);
  return x == x ? e.scale * e.rest + (e.scale - 1) : x;
}
inline double exp_of(double x) { return std::exp(x); }
inline double expm1_of(double x) { return std::expm1(x); }

// A token's decay factor d for one key channel, as keep + change with keep 0 or 1: the state is
// advanced as keep * S + (change * S + ...), which loses no digits of d near 1 or of the rest where
// d is near 0. slope is dd/dw.
template <typename Real>
struct Decay {
  Real keep, change, slope;
};

template <DecayKind KIND, typename Real>
inline Decay<Real> decay_of(Real w) {
  Real log_d = w, log_slope = 1;  // log_slope is dlog d / dw
  if (KIND == LOGLOG) {
    log_d = -exp_of(w);
  } else if (KIND == LOGIT) {
    const Real gate = 1 / (1 + exp_of(-w));
    log_d = Real(-0.60653065971263342) * gate;  // -exp(-1/2)
    log_slope = log_d * (1 - gate);
  }
  // Past this d is 0 in any precision; finite, so that 0 * log d is 0.
  log_d = log_d < Real(-1e4) ? Real(-1e4) : log_d;
  log_slope = KIND == LOGLOG ? log_d : log_slope;
  const Real d = exp_of(log_d), less_one = expm1_of(log_d);
  const bool near_one = !(less_one < Real(-0.5));
  return {near_one ? Real(1) : Real(0), near_one ? less_one : d, d * log_slope};
}

}  // namespace rwkv_jit
