// addcmul_mix backward: over uses dx sums dy and ddelta sums dy * x_j; over tokens dx_j sums
// dy * delta.
//% include "elementwise.h"
//% include "mixes.h"

namespace {

template <typename Lane>
struct Step {
  using Real = typename Lane::Real;
  static constexpr int COUNT = Lane::COUNT;
  using Packed = typename Lane::Packed;
  struct Token {
    Packed delta, dy[USES];
  };

  const Arguments& args;
  const Lane& lane;
  Mixes<Lane> mixes;
  Real sums[USES][COUNT] = {};

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine), mixes(all, mine) {}

  RWKV_JIT_STEP Token load(int64_t t) const {
    Token token;
    token.delta = lane.load(args.delta, t);
    load_gradients(args, lane, args.delta, t, token.dy);
    return token;
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real delta[COUNT], dx[COUNT] = {}, ddelta[COUNT] = {};
    lane.unpack(token.delta, delta);
    each<USES>([&](int use) {
      Real dy[COUNT];
      lane.unpack(token.dy[use], dy);
      each<COUNT>([&](int i) {
        dx[i] += dy[i];
        ddelta[i] += dy[i] * mixes.at[use][i];
        sums[use][i] += dy[i] * delta[i];
      });
    });
    lane.store(args.dx, t, dx);
    lane.store(args.ddelta, t, ddelta);
  }

  RWKV_JIT_STEP void finish(int64_t group) { store_parts(args, lane, group, sums); }
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step_and_sum_parts<Step>(*args);
}
