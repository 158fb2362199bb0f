// Cross entropy backward, a token's logits x at a time.
//   dx_c = dloss (exp(x_c - m - logsum) - [c is the target]) + dmaximum [c is the first maximum]
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
  Element* dx = static_cast<Element*>(args.dlogits) + token * args.C;
  const int64_t target = static_cast<const int64_t*>(args.targets)[token];
  if (target == IGNORED) {
    for (int64_t column = 0; column < args.C; ++column) store(dx[column], Real(0));
    return;
  }
  const bool exists = 0 <= target && target < args.C;
  const int64_t argmax = static_cast<const int32_t*>(args.argmax)[token];
  const auto at_token = [&](const void* from) { return static_cast<const Real*>(from)[token]; };
  const Real maximum = at_token(args.maximum), logsum = at_token(args.logsum);
  const Real dloss = exists ? at_token(args.dloss) : NOT_A_NUMBER;
  visit_row<VECTOR_BYTES>(x, args.C, -INFINITE, [&](int64_t column, Vector some, int count) {
    Vector chances = exponential((some - maximum) - logsum);
    if (column <= target && target < column + count) chances[target - column] -= 1;
    Vector gradient = chances * dloss;
    if (column <= argmax && argmax < column + count)
      gradient[argmax - column] += at_token(args.dmaximum);
    for (int i = 0; i < count; ++i) store(dx[column + i], Real(gradient[i]));
  });
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_tokens(*args, [&](int64_t token) { run_token(*args, token); });
}
