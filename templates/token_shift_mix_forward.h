// token_shift_mix forward: y_t = x_t + (x_{t-1} - x_t) * x_j for each x_j that is given. What is
// before a sequence's first token is its initial state; its last token is its final state.
//% include "elementwise.h"
//% include "mixes.h"
//% include "token_shift.h"

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
  Mixes<Lane> mixes;
  Walk<Arguments> walk;
  Real before[COUNT] = {};

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t first, int64_t last)
      : args(all), lane(mine), mixes(all, mine), walk(all, first) {
    walk.to(first);
    if (first < last && !walk.is_first(first)) lane.read(args.x, first - 1, before);
  }

  RWKV_JIT_STEP Token load(int64_t t) const { return {lane.load(args.x, t)}; }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    walk.to(t);
    if (walk.is_first(t)) read_initial(args, lane, walk.s, before);
    Real x[COUNT];
    lane.unpack(token.x, x);
    Real delta[COUNT];
    each<COUNT>([&](int i) { delta[i] = before[i] - x[i]; });
    mixes.store(args, lane, t, x, delta);
    if (args.final_state != nullptr && walk.is_last(t) && walk.s < args.S)
      lane.store(args.final_state, walk.s, x);
    each<COUNT>([&](int i) { before[i] = x[i]; });
  }

  RWKV_JIT_STEP void finish(int64_t group) {
    if (group > 0 || args.final_state == nullptr) return;
    each_empty(args, [&](int64_t s) {
      read_initial(args, lane, s, before);
      lane.store(args.final_state, s, before);
    });
  }
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step<Step, Element, HEAD_SIZE, Schedule>(*args);
}
