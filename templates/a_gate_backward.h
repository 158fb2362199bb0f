// a_gate backward: dx = dy y (1 - y), da0 its sum over tokens.
//% include "elementwise.h"
#include "rwkv_jit/gate.h"

namespace {

template <typename Lane>
struct Step {
  using Real = typename Lane::Real;
  static constexpr int COUNT = Lane::COUNT;
  using Packed = typename Lane::Packed;
  struct Token {
    Packed x, dy;
  };

  const Arguments& args;
  const Lane& lane;
  Real a0[COUNT], da0[COUNT] = {};

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {
    lane.read_parameter(args.a0, args.a0_dtype, a0);
  }

  RWKV_JIT_STEP Token load(int64_t t) const {
    return {lane.load(args.x, t), lane.load(args.dy, t)};
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real x[COUNT], dx[COUNT];
    lane.unpack(token.x, x);
    lane.unpack(token.dy, dx);
    each<COUNT>([&](int i) {
      const Gate<Real> gate(a0[i] + x[i]);
      dx[i] *= gate.open * gate.shut;
      da0[i] += dx[i];
    });
    lane.store(args.dx, t, dx);
  }

  RWKV_JIT_STEP void finish(int64_t group) { lane.store_part(args.a0_parts, group, da0); }
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step_and_sum<Step, Element, HEAD_SIZE, Schedule>(
      *args, Sum{args->a0_parts, args->da0, args->da0_dtype});
}
