// vres_gate forward: y = v + (v_first - v) * sigmoid(v0 + x).
//% include "elementwise.h"
#include "rwkv_jit/gate.h"

namespace {

template <typename Lane>
struct Step {
  using Real = typename Lane::Real;
  static constexpr int COUNT = Lane::COUNT;
  using Packed = typename Lane::Packed;
  struct Token {
    Packed v, v_first, x;
  };

  const Arguments& args;
  const Lane& lane;
  Real v0[COUNT];

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {
    lane.read_parameter(args.v0, args.v0_dtype, v0);
  }

  RWKV_JIT_STEP Token load(int64_t t) const {
    return {lane.load(args.v, t), lane.load(args.v_first, t), lane.load(args.x, t)};
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real v[COUNT], v_first[COUNT], x[COUNT];
    lane.unpack(token.v, v);
    lane.unpack(token.v_first, v_first);
    lane.unpack(token.x, x);
    each<COUNT>([&](int i) { v[i] += (v_first[i] - v[i]) * Gate<Real>(v0[i] + x[i]).open; });
    lane.store(args.y, t, v);
  }

  RWKV_JIT_STEP void finish(int64_t) {}
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step<Step, Element, HEAD_SIZE, Schedule>(*args);
}
