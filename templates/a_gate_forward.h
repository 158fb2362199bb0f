// a_gate forward: y = sigmoid(a0 + x).
//% include "elementwise.h"
#include "rwkv_jit/gate.h"

namespace {

template <typename Lane>
struct Step {
  using Real = typename Lane::Real;
  static constexpr int COUNT = Lane::COUNT;
  using Packed = typename Lane::Packed;
  struct Token {
    Packed x;
  };

  const Arguments& args;
  const Lane& lane;
  Real a0[COUNT];

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {
    lane.read_parameter(args.a0, args.a0_dtype, a0);
  }

  RWKV_JIT_STEP Token load(int64_t t) const { return {lane.load(args.x, t)}; }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real x[COUNT];
    lane.unpack(token.x, x);
    each<COUNT>([&](int i) { x[i] = Gate<Real>(a0[i] + x[i]).open; });
    lane.store(args.y, t, x);
  }

  RWKV_JIT_STEP void finish(int64_t) {}
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step<Step, Element, HEAD_SIZE, Schedule>(*args);
}
