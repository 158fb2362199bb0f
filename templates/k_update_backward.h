// k_update backward: dk = dnew_k * (1 + (a - 1) * k_a), da = dnew_k * k * k_a, and over tokens
// dk_a sums dnew_k * k * (a - 1).
//% include "elementwise.h"

namespace {

template <typename Lane>
struct Step {
  using Real = typename Lane::Real;
  static constexpr int COUNT = Lane::COUNT;
  using Packed = typename Lane::Packed;
  struct Token {
    Packed k, a, dnew_k;
  };

  const Arguments& args;
  const Lane& lane;
  Real k_a[COUNT], dk_a[COUNT] = {};

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {
    lane.read_parameter(args.k_a, args.k_a_dtype, k_a);
  }

  RWKV_JIT_STEP Token load(int64_t t) const {
    return {lane.load(args.k, t), lane.load(args.a, t), lane.load(args.dnew_k, t)};
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real k[COUNT], a[COUNT], dnew_k[COUNT];
    lane.unpack(token.k, k);
    lane.unpack(token.a, a);
    lane.unpack(token.dnew_k, dnew_k);
    each<COUNT>([&](int i) {
      const Real rate = a[i] - 1, given = dnew_k[i] * k[i];
      dk_a[i] += given * rate;
      k[i] = dnew_k[i] * (1 + rate * k_a[i]);
      a[i] = given * k_a[i];
    });
    lane.store(args.dk, t, k);
    lane.store(args.da, t, a);
  }

  RWKV_JIT_STEP void finish(int64_t group) { lane.store_part(args.k_a_parts, group, dk_a); }
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step_and_sum<Step, Element, HEAD_SIZE, Schedule>(
      *args, Sum{args->k_a_parts, args->dk_a, args->dk_a_dtype});
}
