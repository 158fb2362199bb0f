#pragma once
// What a token's own key counts for in its output, after the header that says what a Lane is.

namespace rwkv_jit {

// c = (r k r_k) . 1 of a head.
template <typename Lane, typename Real, int COUNT>
RWKV_JIT_STEP Real own_key(const Lane& lane, const Real (&r)[COUNT], const Real (&k)[COUNT],
                           const Real (&r_k)[COUNT]) {
  Real share = 0;
  each<COUNT>([&](int i) { share += r[i] * k[i] * r_k[i]; });
  return lane.sum(share);
}

// r and k become their gradients dc k * r_k and dc r * r_k, and dc r * k is added to dr_k.
template <typename Real, int COUNT>
RWKV_JIT_STEP void own_key_backward(Real dc, const Real (&r_k)[COUNT], Real (&r)[COUNT],
                                    Real (&k)[COUNT], Real (&dr_k)[COUNT]) {
  each<COUNT>([&](int i) {
    const Real dr = dc * k[i];
    dr_k[i] += dr * r[i];
    k[i] = dc * r[i] * r_k[i];
    r[i] = dr * r_k[i];
  });
}

}  // namespace rwkv_jit
