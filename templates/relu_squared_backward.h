// relu_squared backward: dx = 2 max(x, 0) dy.
//% include "elementwise.h"

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

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {}

  RWKV_JIT_STEP Token load(int64_t t) const {
    return {lane.load(args.x, t), lane.load(args.dy, t)};
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real x[COUNT], dy[COUNT];
    lane.unpack(token.x, x);
    lane.unpack(token.dy, dy);
    each<COUNT>([&](int i) { x[i] = x[i] < 0 ? 0 : 2 * x[i] * dy[i]; });
    lane.store(args.dx, t, x);
  }

  RWKV_JIT_STEP void finish(int64_t) {}
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step<Step, Element, HEAD_SIZE, Schedule>(*args);
}
