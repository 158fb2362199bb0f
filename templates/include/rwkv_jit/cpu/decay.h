#pragma once
// The gate: what w means, and its slope, a vector of channels at a time.
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "rwkv_jit/cpu/vector.h"
#include "rwkv_jit/layout.h"

namespace rwkv_jit {

template <typename Real, int BYTES>
struct Exponential {
  using Vector = typename VectorOf<Real, BYTES>::type;
  Vector value, less_one;  // e^x and e^x - 1, each good to 2 ulp

  explicit Exponential(Vector x) {
    if constexpr (std::is_same_v<Real, float>) {
      using Bits = typename VectorOf<int32_t, BYTES>::type;
      const Vector low = x < -88.0f ? Vector{} - 88.0f : x;
      const Vector bounded = low > 89.0f ? Vector{} + 89.0f : low;
      const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
      const Vector n = (bounded * 1.44269504f + shifter) - shifter;
      Vector r = bounded - n * 0.693359375f;
      r = r + n * 2.12194440e-4f;
      Vector rest = r * (1.0f / 5040) + 1.0f / 720;  // e^r - 1, by its series
      rest = rest * r + 1.0f / 120;
      rest = rest * r + 1.0f / 24;
      rest = rest * r + 1.0f / 6;
      rest = rest * r + 0.5f;
      rest = r + r * r * rest;
      // 2^n, by its exponent: 0 below the smallest normal number, 255 (infinity) past the largest.
      Bits exponent = __builtin_convertvector(n, Bits) + 127;
      exponent = x < -87.3f ? Bits{} : exponent;
      exponent = x > 88.7f ? Bits{} + 255 : exponent;
      const Vector scale = reinterpret_cast<Vector>(exponent << 23);
      rest = exponent == 0 ? Vector{} : rest;
      rest = exponent == 255 ? Vector{} + 1.0f : rest;  // no 0 * infinity
      value = x == x ? scale * (1 + rest) : x;
      less_one = x == x ? scale * rest + (scale - 1) : x;
    } else {
      for (unsigned lane = 0; lane < BYTES / sizeof(Real); ++lane) {
        value[lane] = std::exp(x[lane]);
        less_one[lane] = std::expm1(x[lane]);
      }
    }
  }
};

// A token's decay factor d, as keep + change with keep 0 or 1: the state is advanced as
// keep * S + (change * S + ...), which loses no digits of d near 1, or of the rest where d is near
// 0.
// slope is dd/dw.
template <DecayKind KIND, typename Real, int BYTES>
struct Decay {
  using Vector = typename VectorOf<Real, BYTES>::type;
  Vector keep, change, slope;

  explicit Decay(Vector w) {
    using Exp = Exponential<Real, BYTES>;
    const Vector one = Vector{} + 1;
    Vector log_d = w, log_slope = one;  // log_slope is dlog d / dw
    if (KIND == LOGLOG) {
      log_d = -Exp(w).value;
    } else if (KIND == LOGIT) {
      const Vector gate = 1 / (1 + Exp(-w).value);
      log_d = Real(-0.60653065971263342) * gate;  // -exp(-1/2)
      log_slope = log_d * (1 - gate);
    }
    // Past this d is 0 in any precision; finite, so that 0 * log d is 0.
    log_d = log_d < Real(-1e4) ? Vector{} - Real(1e4) : log_d;
    log_slope = KIND == LOGLOG ? log_d : log_slope;
    const Exp d(log_d);
    const auto far_from_one = d.less_one < Real(-0.5);
    keep = far_from_one ? Vector{} : one;
    change = far_from_one ? d.value : d.less_one;
    slope = d.value * log_slope;
  }
};

}  // namespace rwkv_jit
