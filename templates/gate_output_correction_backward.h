// gate_output_correction backward, per head, with c = (r k r_k) . 1 and dy = dout * g:
//   dg = dout * (y + c v),   dv = c dy,   dc = dy . v,   dr = dc k * r_k,   dk = dc r * r_k
// and over tokens dr_k sums dc r * k.
//% include "elementwise.h"
#include "rwkv_jit/bonus.h"

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
  Real r_k[COUNT], dr_k[COUNT] = {};

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {
    lane.read_parameter(args.r_k, args.r_k_dtype, r_k);
  }

  RWKV_JIT_STEP Token load(int64_t t) const {
    return {lane.load(args.y, t), lane.load(args.r, t), lane.load(args.k, t),
            lane.load(args.v, t), lane.load(args.g, t), lane.load(args.dout, t)};
  }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real r[COUNT], k[COUNT], y[COUNT], v[COUNT], g[COUNT], dout[COUNT], dbonus = 0;
    lane.unpack(token.r, r);
    lane.unpack(token.k, k);
    const Real bonus = own_key(lane, r, k, r_k);
    lane.unpack(token.y, y);
    lane.unpack(token.v, v);
    lane.unpack(token.g, g);
    lane.unpack(token.dout, dout);
    each<COUNT>([&](int i) {
      const Real dy = dout[i] * g[i];
      g[i] = dout[i] * (y[i] + bonus * v[i]);
      y[i] = dy;
      dbonus += dy * v[i];
      v[i] = bonus * dy;
    });
    lane.store(args.dy, t, y);
    lane.store(args.dg, t, g);
    lane.store(args.dv, t, v);
    own_key_backward(lane.sum(dbonus), r_k, r, k, dr_k);
    lane.store(args.dr, t, r);
    lane.store(args.dk, t, k);
  }

  RWKV_JIT_STEP void finish(int64_t group) { lane.store_part(args.r_k_parts, group, dr_k); }
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step_and_sum<Step, Element, HEAD_SIZE, Schedule>(
      *args, Sum{args->r_k_parts, args->dr_k, args->dr_k_dtype});
}
