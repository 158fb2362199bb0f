// k_update forward: new_k = k * (1 + (a - 1) * k_a).
//% include "elementwise.h"

namespace {

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
  Real k_a[COUNT];

  RWKV_JIT_STEP Step(const Arguments& all, const Lane& mine, int64_t, int64_t)
      : args(all), lane(mine) {
    lane.read_parameter(args.k_a, args.k_a_dtype, k_a);
  }

  RWKV_JIT_STEP Token load(int64_t t) const { return {lane.load(args.k, t), lane.load(args.a, t)}; }

  RWKV_JIT_STEP void run(int64_t t, const Token& token) {
    Real k[COUNT], a[COUNT];
    lane.unpack(token.k, k);
    lane.unpack(token.a, a);
    each<COUNT>([&](int i) { k[i] *= 1 + (a[i] - 1) * k_a[i]; });
    lane.store(args.new_k, t, k);
  }

  RWKV_JIT_STEP void finish(int64_t) {}
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_step<Step, Element, HEAD_SIZE, Schedule>(*args);
}
