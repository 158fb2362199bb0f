// kk_pre forward, per head:
//   u = k * k_k, kk = u / max(|u|, EPS);   new_k = k * (1 + (a - 1) * k_a), neg_kk = -kk,
//   kk_a = kk * a.
//% include "elementwise.h"

namespace {

constexpr double EPS = 1e-12;  // as torch.nn.functional.normalize has it

template <typename Lane>
struct Step {
  using Real = typename Lane::Real;
  static constexpr int COUNT = Lane::COUNT;
  using Packed = typename Lane::Packed;
  struct Token {
    Packed k, a;
  };

  const Arguments& args;
  const Lane& lane;
  Real k_k[COUNT], k_a[COUNT];

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {
    lane.read_parameter(args.k_k, args.k_k_dtype, k_k);
    lane.read_parameter(args.k_a, args.k_a_dtype, k_a);
  }

  RWKV_JIT_STEP Token load(int64_t t) const { return {lane.load(args.k, t), lane.load(args.a, t)}; }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real k[COUNT], a[COUNT], kk[COUNT], square = 0;
    lane.unpack(token.k, k);
    lane.unpack(token.a, a);
    each<COUNT>([&](int i) {
      kk[i] = k[i] * k_k[i];
      square += kk[i] * kk[i];
    });
    const Real norm = square_root(lane.sum(square));
    const Real scale = 1 / (norm < Real(EPS) ? Real(EPS) : norm);
    each<COUNT>([&](int i) {
      kk[i] *= -scale;
      k[i] *= 1 + (a[i] - 1) * k_a[i];
      a[i] *= -kk[i];
    });
    lane.store(args.new_k, t, k);
    lane.store(args.neg_kk, t, kk);
    lane.store(args.kk_a, t, a);
  }

  RWKV_JIT_STEP void finish(int64_t) {}
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step<Step, Element, HEAD_SIZE, Schedule>(*args);
}
