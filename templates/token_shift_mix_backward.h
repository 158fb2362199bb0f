// token_shift_mix backward, with p_t the sum over uses of dy_t * x_j and q_t that of
// dy_t * (1 - x_j):
//   dx_t = q_t + p_{t+1},   dx_j sums dy_t * (x_{t-1} - x_t) over tokens
// p of a sequence's first token is the gradient of its initial state; in p's place after the last
// one comes the gradient of its final state. So a token is done when the next one has been read.
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
    Packed x, dy[USES];
  };

  const Arguments& args;
  const Lane& lane;
  const int64_t begin, end;  // of the group
  Mixes<Lane> mixes;
  Walk<Arguments> walk;
  Real before[COUNT] = {}, waiting[COUNT] = {};  // x_{t-1} and q_{t-1}
  Real sums[USES][COUNT] = {};

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t first, int64_t last)
      : args(all), lane(mine), begin(first), end(last), mixes(all, mine), walk(all, first) {
    walk.to(first);
    if (first < last && !walk.is_first(first)) lane.read(args.x, first - 1, before);
  }

  RWKV_JIT_STEP Token load(int64_t t) const {
    Token token;
    token.x = lane.load(args.x, t);
    load_gradients(args, lane, args.x, t, token.dy);
    return token;
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    walk.to(t);
    const bool is_first = walk.is_first(t);
    if (is_first) read_initial(args, lane, walk.s, before);
    Real x[COUNT], all[COUNT] = {}, earlier[COUNT] = {};
    lane.unpack(token.x, x);
    each<USES>([&](int use) {
      Real dy[COUNT];
      lane.unpack(token.dy[use], dy);
      each<COUNT>([&](int i) {
        all[i] += dy[i];
        earlier[i] += dy[i] * mixes.at[use][i];
        sums[use][i] += dy[i] * (before[i] - x[i]);
      });
    });
    if (!is_first) {
      if (t > begin) store_waiting(t - 1, earlier);
    } else if (args.dinitial_state != nullptr && walk.s < args.S) {
      lane.store(args.dinitial_state, walk.s, earlier);
    }
    each<COUNT>([&](int i) {
      before[i] = x[i];
      waiting[i] = all[i] - earlier[i];
    });
    if (walk.is_last(t)) {
      read_last(earlier);
      store_waiting(t, earlier);
    }
  }

  RWKV_JIT_STEP void finish(int64_t group) {
    if (begin < end && !walk.is_last(end - 1)) {
      Real earlier[COUNT] = {};
      each<USES>([&](int use) {
        if (gradient(args, use) == nullptr) return;
        Real dy[COUNT];
        lane.read(gradient(args, use), end, dy);
        each<COUNT>([&](int i) { earlier[i] += dy[i] * mixes.at[use][i]; });
      });
      store_waiting(end - 1, earlier);
    }
    store_parts(args, lane, group, sums);
    if (group > 0 || args.dinitial_state == nullptr) return;
    each_empty(args, [&](int64_t s) {
      walk.s = s;
      read_last(before);
      lane.store(args.dinitial_state, s, before);
    });
  }

 private:
  // The gradient of the final state of the sequence that one is in.
  RWKV_JIT_STEP void read_last(Real (&dlast)[COUNT]) const {
    each<COUNT>([&](int i) { dlast[i] = 0; });
    if (args.dfinal_state != nullptr && walk.s < args.S)
      lane.read(args.dfinal_state, walk.s, dlast);
  }

  RWKV_JIT_STEP void store_waiting(int64_t t, const Real (&rest)[COUNT]) const {
    Real dx[COUNT];
    each<COUNT>([&](int i) { dx[i] = waiting[i] + rest[i]; });
    lane.store(args.dx, t, dx);
  }
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step_and_sum_parts<Step>(*args);
}
