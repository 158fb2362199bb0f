// vres_gate backward, s = sigmoid(v0 + x):
//   dv = dy (1 - s), dv_first = dy s, dx = dy (v_first - v) s (1 - s), dv0 its sum over tokens.
//% include "elementwise.h"
#include "rwkv_jit/gate.h"

namespace {

template <typename Lane>
struct Step {
  using Real = typename Lane::Real;
  static constexpr int COUNT = Lane::COUNT;
  using Packed = typename Lane::Packed;
  struct Token {
    Packed v, v_first, x, dy;
  };

  const Arguments& args;
  const Lane& lane;
  Real v0[COUNT], dv0[COUNT] = {};

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {
    lane.read_parameter(args.v0, args.v0_dtype, v0);
  }

  RWKV_JIT_STEP Token load(int64_t t) const {
    return {lane.load(args.v, t), lane.load(args.v_first, t), lane.load(args.x, t),
            lane.load(args.dy, t)};
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real v[COUNT], v_first[COUNT], x[COUNT], dy[COUNT];
    lane.unpack(token.v, v);
    lane.unpack(token.v_first, v_first);
    lane.unpack(token.x, x);
    lane.unpack(token.dy, dy);
    each<COUNT>([&](int i) {
      const Gate<Real> gate(v0[i] + x[i]);
      const Real difference = v_first[i] - v[i];
      v[i] = dy[i] * gate.shut;
      v_first[i] = dy[i] * gate.open;
      x[i] = v[i] * gate.open * difference;
      dv0[i] += x[i];
    });
    lane.store(args.dv, t, v);
    lane.store(args.dv_first, t, v_first);
    lane.store(args.dx, t, x);
  }

  RWKV_JIT_STEP void finish(int64_t group) { lane.store_part(args.v0_parts, group, dv0); }
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step_and_sum<Step, Element, HEAD_SIZE, Schedule>(
      *args, Sum{args->v0_parts, args->dv0, args->dv0_dtype});
}
