// Cross entropy forward, a token's logits x at a time.
//   m = max_c x_c,   logsum = log sum_c exp(x_c - m),   loss = logsum + (m - x_target)
#include <limits>

//% include "launcher.h"
#include "rwkv_jit/cpu/decay.h"
#include "rwkv_jit/cpu/error.h"
#include "rwkv_jit/cpu/parallel.h"
#include "rwkv_jit/cpu/row.h"
//% include "l2wrap_cross_entropy_cpu.h"
namespace {

void run_token(const Arguments& args, int64_t token) {
  const Element* x = static_cast<const Element*>(args.logits) + token * args.C;
  const int64_t target = static_cast<const int64_t*>(args.targets)[token];
  Real loss = 0, maximum = 0, logsum = 0;
  int64_t argmax = 0;
  if (target != IGNORED) {
    Vector largest = splat<Vector>(-INFINITE);
    visit_row<VECTOR_BYTES>(x, args.C, -INFINITE, [&](int64_t, Vector some, int) {
      largest = some > largest ? some : largest;
    });
    maximum = largest[0];
    for (int i = 1; i < WIDTH; ++i) maximum = std::max(maximum, Real(largest[i]));
    while (argmax + 1 < args.C && !(load(x[argmax]) == maximum)) ++argmax;
    // All -inf: nothing to subtract.
    const Vector base = splat<Vector>(maximum == -INFINITE ? Real(0) : maximum);
    Vector sum = {};
    visit_row<VECTOR_BYTES>(x, args.C, -INFINITE,
                            [&](int64_t, Vector some, int) { sum += exponential(some - base); });
    logsum = std::log(lane_sum<Real, WIDTH>(sum));
    loss = 0 <= target && target < args.C ? logsum + (maximum - load(x[target])) : NOT_A_NUMBER;
  }
  static_cast<Real*>(args.loss)[token] = loss;
  static_cast<Real*>(args.maximum)[token] = maximum;
  static_cast<Real*>(args.logsum)[token] = logsum;
  static_cast<int32_t*>(args.argmax)[token] = static_cast<int32_t>(argmax);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_tokens(*args, [&](int64_t token) { run_token(*args, token); });
}
