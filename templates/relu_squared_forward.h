// relu_squared forward: y = max(x, 0)^2.
//% include "elementwise.h"

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

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {}

  RWKV_JIT_STEP Token load(int64_t t) const { return {lane.load(args.x, t)}; }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real x[COUNT];
    lane.unpack(token.x, x);
    each<COUNT>([&](int i) { x[i] = x[i] < 0 ? 0 : x[i] * x[i]; });
    lane.store(args.y, t, x);
  }

  RWKV_JIT_STEP void finish(int64_t) {}
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step<Step, Element, HEAD_SIZE, Schedule>(*args);
}
