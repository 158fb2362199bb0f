// wkv6 and wkv5 forward on a CPU: sequences and heads in parallel, two tokens at a time.
//   y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d_t) + v_t k_t^T
// Two tokens, 0 and 1, after a state S:
//   y_0 = S r_0 + ((u * k_0) . r_0) v_0
//   y_1 = S (d_0 * r_1) + (k_0 . r_1) v_0 + ((u * k_1) . r_1) v_1
//   S' = S diag(d_0 d_1) + v_0 (d_1 * k_0)^T + v_1 k_1^T
// Rows of S need nothing of each other, so a block of rows takes all tokens of a chunk while it
// lies in the nearest cache. One pass over the block serves two tokens.
#include <cstdint>
#include <initializer_list>

//% include "prelude.h"
#include "rwkv_jit/cpu/decay.h"
#include "rwkv_jit/cpu/parallel.h"
#include "rwkv_jit/cpu/state.h"
#include "rwkv_jit/cpu/tokens.h"
#include "rwkv_jit/cpu/vector.h"
//% include "cpu_types.h"
//% include "wkv6_tokens.h"

namespace {

using namespace rwkv_jit;

static_assert(L % 2 == 0, "a chunk is a whole number of pairs");

// A pair of tokens.
struct Pair {
  Row r[2], k[2];  // r_0, d_0 * r_1 and d_1 * k_0, k_1
  Row keep, change;
  Real bonus[2];  // (u * k) . r
  Real cross;     // k_0 . r_1
};

// A thread's own memory: a chunk of tokens, converted, and one head's state.
struct Workspace {
  alignas(64) Pair pairs[L / 2];
  alignas(64) Real v[L][N], y[L][N];
  alignas(64) Row u, w;
  alignas(64) Row d[2], less_one[2];  // of the pair at hand
  alignas(64) Real state[N * N];
  bool all_keep;
};

void load_gate(const Arguments& args, int64_t row, Workspace& work, int at) {
  load_mixed_row<Element, N>(args.w, args.w_dtype, row, reals(work.w));
  for (int x = 0; x < VECTORS; ++x) {
    const Gate gate(work.w[x]);
    work.d[at][x] = gate.factor();
    work.less_one[at][x] = gate.factor_less_one();
  }
}

// Token `at` of a pair; after the last token, one that changes nothing.
void load_token(const Arguments& args, int64_t t, int64_t end, int64_t head, int at,
                Workspace& work, Pair& pair, Real* v) {
  const int64_t row = t * args.H + head;
  if (t < end) {
    load_row<Element, N>(args.r, row, reals(pair.r[at]));
    load_row<Element, N>(args.k, row, reals(pair.k[at]));
    load_row<Element, N>(args.v, row, v);
    if (DECAY_PER_TOKEN) load_gate(args, row, work, at);
  } else {
    for (int x = 0; x < VECTORS; ++x) {
      pair.r[at][x] = pair.k[at][x] = work.less_one[at][x] = Vector{};
      work.d[at][x] = Vector{} + 1;
    }
    std::fill_n(v, N, Real(0));
  }
}

// Out of line, where the gate's constants stay in registers.
__attribute__((noinline)) void load_tokens(const Arguments& args, int64_t first, int count,
                                           int64_t head, Workspace& work) {
  load_mixed_row<Element, N>(args.u, args.u_dtype, head, reals(work.u));
  if (!DECAY_PER_TOKEN)
    for (int at = 0; at < 2; ++at) load_gate(args, head, work, at);
  Vector least_keep = splat<Vector>(Real(1));
  for (int t = 0; t < count; t += 2) {
    Pair& pair = work.pairs[t / 2];
    for (int at = 0; at < 2; ++at)
      load_token(args, first + t + at, first + count, head, at, work, pair, work.v[t + at]);
    Vector bonus[2] = {}, cross = {};
    for (int x = 0; x < VECTORS; ++x) {
      const Vector k = pair.k[0][x], r = pair.r[1][x];
      bonus[0] += work.u[x] * k * pair.r[0][x];
      bonus[1] += work.u[x] * pair.k[1][x] * r;
      cross += k * r;
      pair.r[1][x] = r * work.d[0][x];
      pair.k[0][x] = k * work.d[1][x];
      // d - 1 of both: a sum of numbers of one sign.
      const Gate both(work.d[0][x] * work.d[1][x],
                      work.less_one[0][x] * work.d[1][x] + work.less_one[1][x]);
      pair.keep[x] = both.keep;
      pair.change[x] = both.change;
      least_keep = both.keep < least_keep ? both.keep : least_keep;
    }
    for (int at = 0; at < 2; ++at) pair.bonus[at] = lane_sum<Real, WIDTH>(bonus[at]);
    pair.cross = lane_sum<Real, WIDTH>(cross);
  }
  work.all_keep = true;
  for (int lane = 0; lane < WIDTH; ++lane) work.all_keep &= least_keep[lane] == 1;
}

// Takes COUNT vectors of rows, beginning at row `first`, through `count` tokens, and asks for its
// share of the chunk whose tokens begin at row `next` of the inputs. Where every keep is 1, adding
// is the same as multiplying by it, and faster.
template <int COUNT, bool ALL_KEEP>
void advance_rows(const Arguments& args, int64_t next, Workspace& work, int first, int count) {
  Vector* state = reinterpret_cast<Vector*>(work.state + static_cast<int64_t>(first) * N);
  for (int t = 0; t < count; t += 2) {
    Pair& pair = work.pairs[t / 2];
    const Real *r0_row = reals(pair.r[0]), *r1_row = reals(pair.r[1]);
    const Real *k0_row = reals(pair.k[0]), *k1_row = reals(pair.k[1]);
    const Real *keep_row = reals(pair.keep), *change_row = reals(pair.change);
    Vector v[2][COUNT], y[2][COUNT];
    for (int at = 0; at < 2; ++at) {
      prefetch_tokens<COUNT * WIDTH>(args, {args.r, args.k, args.v}, next + (t + at) * args.H,
                                     first);
      const Vector* row = reinterpret_cast<const Vector*>(work.v[t + at] + first);
      for (int x = 0; x < COUNT; ++x) {
        v[at][x] = row[x];
        y[at][x] = row[x] * pair.bonus[at];
      }
    }
    for (int x = 0; x < COUNT; ++x) y[1][x] += v[0][x] * pair.cross;
    for (int j = 0; j < N; ++j) {
      const Vector keep = splat<Vector>(keep_row[j]), change = splat<Vector>(change_row[j]);
      const Vector r0 = splat<Vector>(r0_row[j]), r1 = splat<Vector>(r1_row[j]);
      const Vector k0 = splat<Vector>(k0_row[j]), k1 = splat<Vector>(k1_row[j]);
      for (int x = 0; x < COUNT; ++x) {
        const Vector s = state[j * COUNT + x];
        y[0][x] += s * r0;
        y[1][x] += s * r1;
        state[j * COUNT + x] =
            (ALL_KEEP ? s : s * keep) + (s * change + (v[0][x] * k0 + v[1][x] * k1));
      }
    }
    for (int at = 0; at < 2; ++at) {
      Vector* out = reinterpret_cast<Vector*>(work.y[t + at] + first);
      for (int x = 0; x < COUNT; ++x) out[x] = y[at][x];
    }
  }
}

}  // namespace

//% include "cpu_forward.h"

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_forwards(*args, N * N * 4);
}
