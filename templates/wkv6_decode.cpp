// wkv6 and wkv5 decode on a CPU: a few tokens a sequence, states in place, heads in parallel.
//   y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d_t) + v_t k_t^T
#include <algorithm>
#include <cstdint>

//% include "prelude.h"
#include "rwkv_jit/cpu/decay.h"
#include "rwkv_jit/cpu/parallel.h"
#include "rwkv_jit/cpu/state.h"
#include "rwkv_jit/cpu/tokens.h"
#include "rwkv_jit/cpu/vector.h"
//% include "cpu_types.h"
//% include "wkv6_decay.h"

namespace {

using namespace rwkv_jit;

struct Token {
  Row r, k, v, keep, change, y;
  Real bonus;  // (u * k) . r
};

// Out of line, where the gate's constants stay in registers.
__attribute__((noinline)) void load_token(const Arguments& args, int64_t row, int64_t head,
                                          Token& token) {
  alignas(64) Row w, u;
  load_row<Element, N>(args.r, row, reals(token.r));
  load_row<Element, N>(args.k, row, reals(token.k));
  load_row<Element, N>(args.v, row, reals(token.v));
  load_mixed_row<Element, N>(args.w, args.w_dtype, decay_row(row, head), reals(w));
  load_mixed_row<Element, N>(args.u, args.u_dtype, head, reals(u));
  for (int x = 0; x < VECTORS; ++x) {
    const Gate gate(w[x]);
    token.keep[x] = gate.keep;
    token.change[x] = gate.change;
    u[x] *= token.k[x];
  }
  token.bonus = dot<Real, VECTORS>(u, token.r);
}

// The results of a row that is skipped.
void skip_row(const Arguments& args, int64_t row) { clear_row<Element, N>(args.y, row); }

// Takes COUNT rows, the first of which is row `first`, through a token.
template <int COUNT>
void advance_rows(Token& token, int first, Row* rows) {
  const Real* v = reals(token.v) + first;
  Vector y[COUNT] = {};
  for (int x = 0; x < VECTORS; ++x)
    for (int i = 0; i < COUNT; ++i) {
      const Vector s = rows[i][x];
      y[i] += s * token.r[x];
      rows[i][x] = s * token.keep[x] + (s * token.change[x] + v[i] * token.k[x]);
    }
  for (int i = 0; i < COUNT; ++i)
    reals(token.y)[first + i] = lane_sum<Real, WIDTH>(y[i]) + token.bonus * v[i];
}

// Takes COUNT vectors of rows, the first of which is row `first`, through a token; key by key.
template <int COUNT>
void advance_columns(Token& token, int first, Vector* columns) {
  const Vector* v = token.v + first / WIDTH;
  Vector y[COUNT];
  for (int x = 0; x < COUNT; ++x) y[x] = token.bonus * v[x];
  for (int j = 0; j < N; ++j) {
    const Vector keep = splat<Vector>(reals(token.keep)[j]);
    const Vector change = splat<Vector>(reals(token.change)[j]);
    const Vector k = splat<Vector>(reals(token.k)[j]), r = splat<Vector>(reals(token.r)[j]);
    for (int x = 0; x < COUNT; ++x) {
      const Vector s = columns[j * COUNT + x];
      y[x] += s * r;
      columns[j * COUNT + x] = s * keep + (s * change + v[x] * k);
    }
  }
  for (int x = 0; x < COUNT; ++x) token.y[first / WIDTH + x] = y[x];
}

}  // namespace

//% include "cpu_decode.h"
