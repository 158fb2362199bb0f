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

  // x from -88, where e^x is 0 in float32, to 88, or not a number.
  explicit Exponential(Vector x) {
    if constexpr (std::is_same_v<Real, float>) {
      using Bits = typename VectorOf<int32_t, BYTES>::type;
      const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
      const Vector n = (x * 1.44269504f + shifter) - shifter;
      Vector r = x - n * 0.693359375f;
      r = r + n * 2.12194440e-4f;
      const Vector r2 = r * r;  // e^r - 1, by its series, in a tree for speed
      const Vector first = r * (1.0f / 6) + 0.5f, second = r * (1.0f / 120) + 1.0f / 24,
                   third = r * (1.0f / 5040) + 1.0f / 720;
      const Vector rest = r + r2 * (first + r2 * (second + r2 * third));
      // 2^n, by its exponent: n = -127, below the smallest normal number, gives 0.
      const Bits exponent = __builtin_convertvector(n, Bits) + 127;
      const Vector scale = reinterpret_cast<Vector>(exponent << 23);
      value = scale * rest + scale;
      less_one = scale * rest + (scale - 1);
    } else {
      for (unsigned lane = 0; lane < BYTES / sizeof(Real); ++lane) {
        value[lane] = std::exp(x[lane]);
        less_one[lane] = std::expm1(x[lane]);
      }
    }
  }
};

// Past it e^x is 0 (in float64 the smallest normal number).
template <typename Real>
constexpr Real LEAST = sizeof(Real) == sizeof(float) ? -88 : -708;

template <typename Real, typename Vector>
inline Vector bounded(Vector x, Real low, Real high) {
  const Vector above = x < low ? Vector{} + low : x;
  return above > high ? Vector{} + high : above;
}

template <typename Real, int BYTES, typename Vector>
inline Vector sigmoid(Vector x) {
  return 1 / (1 + Exponential<Real, BYTES>(bounded<Real>(-x, LEAST<Real>, -LEAST<Real>)).value);
}

// A token's decay factor d, as keep + change with keep 0 or 1: the state is advanced as
// keep * S + (change * S + ...), which loses no digits of d near 1, or of the rest where d is near
// 0. slope is dd/dw.
template <DecayKind KIND, typename Real, int BYTES>
struct Decay {
  using Vector = typename VectorOf<Real, BYTES>::type;
  Vector keep, change, slope;

  // From d and d - 1.
  Decay(Vector d, Vector less_one) : slope{} { split(d, less_one); }

  explicit Decay(Vector w) {
    using Exp = Exponential<Real, BYTES>;
    const Vector one = Vector{} + 1;
    if (KIND == FACTOR) {
      split(w, w - one);
      slope = one;
      return;
    }
    Vector log_slope = one;  // dlog d / dw
    Vector log_d = bounded<Real>(w, FAR, -LEAST<Real>);
    if (KIND == LOGLOG) {
      log_d = log_slope = -Exp(bounded<Real>(w, LEAST<Real>, 9.25)).value;
    } else if (KIND == LOGIT) {
      const Vector gate = sigmoid<Real, BYTES>(w);
      log_d = Real(-0.60653065971263342) * gate;  // -exp(-1/2)
      log_slope = log_d * (1 - gate);
    }
    const Exp d(log_d < LEAST<Real> ? Vector{} + LEAST<Real> : log_d);
    split(d.value, d.less_one);
    slope = d.value * log_slope;
  }

  Vector factor() const { return keep + change; }
  Vector factor_less_one() const { return change + (keep - 1); }

 private:
  // Past it d is 0 in any precision, and 0 * log d is 0 because log d is finite.
  static constexpr Real FAR = -1e4;

  void split(Vector d, Vector less_one) {
    const auto far_from_one = less_one < Real(-0.5);
    keep = far_from_one ? Vector{} : Vector{} + 1;
    change = far_from_one ? d : less_one;
  }
};

}  // namespace rwkv_jit
