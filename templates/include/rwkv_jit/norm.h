#pragma once
// The group norm of a head, after the header that says what a Lane is.

namespace rwkv_jit {

// y becomes (y - mean(y)) / sqrt(mean((y - mean(y))^2) + eps). Returns the inverse of that root.
template <int HEAD_SIZE, typename Lane, typename Real, int COUNT>
RWKV_JIT_STEP Real normalise(const Lane& lane, Real eps, Real (&y)[COUNT]) {
  Real sum = 0, square = 0;
  each<COUNT>([&](int i) { sum += y[i]; });
  const Real mean = lane.sum(sum) / HEAD_SIZE;
  each<COUNT>([&](int i) {
    y[i] = lane.has(i) ? y[i] - mean : 0;
    square += y[i] * y[i];
  });
  const Real scale = 1 / square_root(lane.sum(square) / HEAD_SIZE + eps);
  each<COUNT>([&](int i) { y[i] *= scale; });
  return scale;
}

}  // namespace rwkv_jit
