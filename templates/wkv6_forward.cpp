// wkv6 and wkv5 forward on a CPU: sequences and heads in parallel, each token by token.
//   y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d_t) + v_t k_t^T
// Rows of S need nothing of each other, so a block of rows takes all tokens of a chunk while it
// lies in the nearest cache. One pass over the block gathers S_{t-1} r_t and advances it.
#include <cstdint>
#include <initializer_list>

//% include "prelude.h"
#include "rwkv_jit/cpu/decay.h"
#include "rwkv_jit/cpu/parallel.h"
#include "rwkv_jit/cpu/state.h"
#include "rwkv_jit/cpu/tokens.h"
#include "rwkv_jit/cpu/vector.h"
//% include "cpu_types.h"
//% include "wkv6_gate.h"

namespace {

using namespace rwkv_jit;

// A thread's own memory: a chunk of tokens, converted, and one head's state.
struct Workspace {
  alignas(64) Row r[L], k[L], keep[GATES], change[GATES];
  alignas(64) Row u, w;
  alignas(64) Real v[L][N], y[L][N];
  alignas(64) Real state[N * N];
  Real bonus[L];  // (u * k_t) . r_t
  bool all_keep;
};

// Out of line, where the gate's constants stay in registers.
__attribute__((noinline)) void load_tokens(const Arguments& args, int64_t first, int count,
                                           int64_t head, Workspace& work) {
  load_mixed_row<Element, N>(args.u, args.u_dtype, head, reals(work.u));
  for (int t = 0; t < count; ++t) {
    const int64_t row = (first + t) * args.H + head;
    load_row<Element, N>(args.r, row, reals(work.r[t]));
    load_row<Element, N>(args.k, row, reals(work.k[t]));
    load_row<Element, N>(args.v, row, work.v[t]);
    Vector bonus = {};
    for (int x = 0; x < VECTORS; ++x) bonus += work.u[x] * work.k[t][x] * work.r[t][x];
    work.bonus[t] = lane_sum<Real, WIDTH>(bonus);
  }
  load_gates(args, first, count, head, work, [](int, int, const Gate&) {});
}

// Takes COUNT vectors of rows, beginning at row `first`, through `count` tokens, and asks for its
// share of the chunk whose tokens begin at row `next` of the inputs. Where every keep is 1, adding
// is the same as multiplying by it, and faster. Two sums for y, so that one need not wait for the
// other.
template <int COUNT, bool ALL_KEEP>
void advance_rows(const Arguments& args, int64_t next, Workspace& work, int first, int count) {
  Vector* state = reinterpret_cast<Vector*>(work.state + static_cast<int64_t>(first) * N);
  for (int t = 0; t < count; ++t) {
    prefetch_tokens<COUNT * WIDTH>(args, {args.r, args.k, args.v}, next + t * args.H, first);
    const Real *r_row = reals(work.r[t]), *k_row = reals(work.k[t]);
    const Real* keep_row = reals(work.keep[gate_at(t)]);
    const Real* change_row = reals(work.change[gate_at(t)]);
    const Vector* v = reinterpret_cast<const Vector*>(work.v[t] + first);
    Vector value[COUNT], y[2][COUNT];
    for (int x = 0; x < COUNT; ++x) {
      value[x] = v[x];
      y[0][x] = value[x] * work.bonus[t];
      y[1][x] = Vector{};
    }
    for (int pair = 0; pair < N; pair += 2)
      for (int half = 0; half < 2; ++half) {
        const int j = pair + half;
        const Vector keep = splat<Vector>(keep_row[j]), change = splat<Vector>(change_row[j]);
        const Vector r = splat<Vector>(r_row[j]), k = splat<Vector>(k_row[j]);
        for (int x = 0; x < COUNT; ++x) {
          const Vector s = state[j * COUNT + x];
          y[half][x] += s * r;
          state[j * COUNT + x] = (ALL_KEEP ? s : s * keep) + (s * change + value[x] * k);
        }
      }
    Vector* out = reinterpret_cast<Vector*>(work.y[t] + first);
    for (int x = 0; x < COUNT; ++x) out[x] = y[0][x] + y[1][x];
  }
}

}  // namespace

//% include "cpu_forward.h"

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_heads<Workspace>(*args, N * N * 4, run_forward);
}
