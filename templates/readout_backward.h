// readout backward, per head, with x = norm(y) as in the forward, s its scale, c = (r k r_k) . 1
// and dp = dout * g:
//   dg = dout * (x * weight + bias + c v),   dv = c dp,   dc = dp . v,
//   dr = dc k * r_k,   dk = dc r * r_k,
//   dx = dp * weight,   dy = s (dx - mean(dx) - x mean(dx * x))
// and over tokens dr_k sums dc r * k, dweight sums dp * x, dbias sums dp.
//% include "elementwise.h"
#include "rwkv_jit/bonus.h"
#include "rwkv_jit/norm.h"

namespace {

template <typename Lane>
struct Step {
  using Real = typename Lane::Real;
  static constexpr int COUNT = Lane::COUNT;
  using Packed = typename Lane::Packed;
  struct Token {
    Packed y, r, k, v, g, dout;
  };

  const Arguments& args;
  const Lane& lane;
  Real r_k[COUNT], weight[COUNT], bias[COUNT];
  Real dr_k[COUNT] = {}, dweight[COUNT] = {}, dbias[COUNT] = {};

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {
    lane.read_parameter(args.r_k, args.r_k_dtype, r_k);
    lane.read_parameter(args.weight, args.weight_dtype, weight);
    lane.read_parameter(args.bias, args.bias_dtype, bias);
  }

  RWKV_JIT_STEP Token load(int64_t t) const {
    return {lane.load(args.y, t), lane.load(args.r, t), lane.load(args.k, t),
            lane.load(args.v, t), lane.load(args.g, t), lane.load(args.dout, t)};
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real r[COUNT], k[COUNT], dp[COUNT], dbonus = 0;
    lane.unpack(token.r, r);
    lane.unpack(token.k, k);
    const Real bonus = own_key(lane, r, k, r_k);

    Real x[COUNT];
    lane.unpack(token.y, x);
    const Real scale = normalise<HEAD_SIZE>(lane, Real(args.eps), x);

    Real v[COUNT], g[COUNT];
    lane.unpack(token.v, v);
    lane.unpack(token.g, g);
    lane.unpack(token.dout, dp);
    each<COUNT>([&](int i) {
      const Real dg = dp[i] * (x[i] * weight[i] + bias[i] + bonus * v[i]);
      dp[i] *= g[i];
      g[i] = dg;
      dbonus += dp[i] * v[i];
      v[i] = bonus * dp[i];
    });
    lane.store(args.dg, t, g);
    lane.store(args.dv, t, v);

    own_key_backward(lane.sum(dbonus), r_k, r, k, dr_k);
    lane.store(args.dr, t, r);
    lane.store(args.dk, t, k);

    Real sum = 0, along = 0;
    each<COUNT>([&](int i) {
      dbias[i] += dp[i];
      dweight[i] += dp[i] * x[i];
      dp[i] *= weight[i];
      sum += dp[i];
      along += dp[i] * x[i];
    });
    const Real mean = lane.sum(sum) / HEAD_SIZE, share = lane.sum(along) / HEAD_SIZE;
    each<COUNT>([&](int i) { dp[i] = scale * (dp[i] - mean - x[i] * share); });
    lane.store(args.dy, t, dp);
  }

  RWKV_JIT_STEP void finish(int64_t group) {
    lane.store_part(args.r_k_parts, group, dr_k);
    lane.store_part(args.weight_parts, group, dweight);
    lane.store_part(args.bias_parts, group, dbias);
  }
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step_and_sum<Step, Element, HEAD_SIZE, Schedule>(
      *args, Sum{args->r_k_parts, args->dr_k, args->dr_k_dtype},
      Sum{args->weight_parts, args->dweight, args->dweight_dtype},
      Sum{args->bias_parts, args->dbias, args->dbias_dtype});
}
