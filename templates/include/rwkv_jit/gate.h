#pragma once
// The logistic function, after the header that says what RWKV_JIT_STEP and exponential are.

namespace rwkv_jit {

// sigmoid(x), and 1 - sigmoid(x), which keeps its digits where the first is near 1.
template <typename Real>
struct Gate {
  Real open, shut;

  explicit RWKV_JIT_STEP Gate(Real x) {
    const Real small = exponential(x < 0 ? x : -x), most = inverse(1 + small), least = small * most;
    open = x < 0 ? least : most;
    shut = x < 0 ? most : least;
  }
};

}  // namespace rwkv_jit
