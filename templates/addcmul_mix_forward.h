// addcmul_mix forward: y = x + delta * x_j for each x_j that is given.
//% include "elementwise.h"
//% include "mixes.h"

namespace {

template <typename Lane>
struct Step {
  using Real = typename Lane::Real;
  static constexpr int COUNT = Lane::COUNT;
  using Packed = typename Lane::Packed;
  struct Token {
    Packed x, delta;
  };

  const Arguments& args;
  const Lane& lane;
  Mixes<Lane> mixes;

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine), mixes(all, mine) {}

  RWKV_JIT_STEP Token load(int64_t t) const {
    return {lane.load(args.x, t), lane.load(args.delta, t)};
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real x[COUNT], delta[COUNT];
    lane.unpack(token.x, x);
    lane.unpack(token.delta, delta);
    mixes.store(args, lane, t, x, delta);
  }

  RWKV_JIT_STEP void finish(int64_t) {}
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step<Step, Element, HEAD_SIZE, Schedule>(*args);
}
