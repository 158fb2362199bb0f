// readout forward, per head: out = (norm(y) * weight + bias + (r k r_k) . 1 v) * g, where
//   norm(y) = (y - mean(y)) / sqrt(mean((y - mean(y))^2) + eps)
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
    Packed y, r, k, v, g;
  };

  const Arguments& args;
  const Lane& lane;
  Real r_k[COUNT], weight[COUNT], bias[COUNT];

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {
    lane.read_parameter(args.r_k, args.r_k_dtype, r_k);
    lane.read_parameter(args.weight, args.weight_dtype, weight);
    lane.read_parameter(args.bias, args.bias_dtype, bias);
  }

  RWKV_JIT_STEP Token load(int64_t t) const {
    return {lane.load(args.y, t), lane.load(args.r, t), lane.load(args.k, t), lane.load(args.v, t),
            lane.load(args.g, t)};
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real y[COUNT], r[COUNT], k[COUNT], v[COUNT], g[COUNT];
    lane.unpack(token.y, y);
    lane.unpack(token.r, r);
    lane.unpack(token.k, k);
    lane.unpack(token.v, v);
    lane.unpack(token.g, g);
    const Real bonus = own_key(lane, r, k, r_k);
    normalise<HEAD_SIZE>(lane, Real(args.eps), y);
    each<COUNT>([&](int i) { y[i] = (y[i] * weight[i] + bias[i] + bonus * v[i]) * g[i]; });
    lane.store(args.out, t, y);
  }

  RWKV_JIT_STEP void finish(int64_t) {}
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step<Step, Element, HEAD_SIZE, Schedule>(*args);
}
