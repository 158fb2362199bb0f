// kk_pre backward, per head, with u = k * k_k, n = max(|u|, EPS), kk = u / n:
//   dkk = dkk_a * a - dneg_kk;   du = (dkk - kk (kk . dkk)) / n, where |u| < EPS dkk / n
//   dk = dnew_k * (1 + (a - 1) * k_a) + du * k_k,   da = dnew_k * k * k_a + dkk_a * kk
// and over tokens dk_k sums du * k, dk_a sums dnew_k * k * (a - 1).
//% include "elementwise.h"

namespace {

constexpr double EPS = 1e-12;  // as torch.nn.functional.normalize has it

template <typename Lane>
struct Step {
  using Real = typename Lane::Real;
  static constexpr int COUNT = Lane::COUNT;
  using Packed = typename Lane::Packed;
  struct Token {
    Packed k, a, dnew_k, dneg_kk, dkk_a;
  };

  const Arguments& args;
  const Lane& lane;
  Real k_k[COUNT], k_a[COUNT], dk_k[COUNT] = {}, dk_a[COUNT] = {};

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {
    lane.read_parameter(args.k_k, args.k_k_dtype, k_k);
    lane.read_parameter(args.k_a, args.k_a_dtype, k_a);
  }

  RWKV_JIT_STEP Token load(int64_t t) const {
    return {lane.load(args.k, t), lane.load(args.a, t), lane.load(args.dnew_k, t),
            lane.load(args.dneg_kk, t), lane.load(args.dkk_a, t)};
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real k[COUNT], a[COUNT], kk[COUNT], dnew_k[COUNT], dkk[COUNT], dkk_a[COUNT], square = 0;
    lane.unpack(token.k, k);
    lane.unpack(token.a, a);
    lane.unpack(token.dnew_k, dnew_k);
    lane.unpack(token.dneg_kk, dkk);
    lane.unpack(token.dkk_a, dkk_a);
    each<COUNT>([&](int i) {
      kk[i] = k[i] * k_k[i];
      square += kk[i] * kk[i];
    });
    const Real norm = square_root(lane.sum(square));
    const bool small = norm < Real(EPS);
    const Real scale = 1 / (small ? Real(EPS) : norm);
    Real along = 0;
    each<COUNT>([&](int i) {
      kk[i] *= scale;
      dkk[i] = dkk_a[i] * a[i] - dkk[i];
      along += kk[i] * dkk[i];
    });
    along = lane.sum(along);
    if (small) along = 0;
    each<COUNT>([&](int i) {
      const Real du = (dkk[i] - kk[i] * along) * scale, rate = a[i] - 1, given = dnew_k[i] * k[i];
      dk_k[i] += du * k[i];
      dk_a[i] += given * rate;
      k[i] = dnew_k[i] * (1 + rate * k_a[i]) + du * k_k[i];
      a[i] = given * k_a[i] + dkk_a[i] * kk[i];
    });
    lane.store(args.dk, t, k);
    lane.store(args.da, t, a);
  }

  RWKV_JIT_STEP void finish(int64_t group) {
    lane.store_part(args.k_k_parts, group, dk_k);
    lane.store_part(args.k_a_parts, group, dk_a);
  }
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step_and_sum<Step, Element, HEAD_SIZE, Schedule>(
      *args, Sum{args->k_k_parts, args->dk_k, args->dk_k_dtype},
      Sum{args->k_a_parts, args->dk_a, args->dk_a_dtype});
}
