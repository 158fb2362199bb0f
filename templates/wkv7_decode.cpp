// wkv7 decode on a CPU: a few tokens a sequence, states in place, heads in parallel.
//   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t
#include <algorithm>
#include <cmath>
#include <cstdint>

//% include "prelude.h"
#include "rwkv_jit/cpu/decay.h"
#include "rwkv_jit/cpu/parallel.h"
#include "rwkv_jit/cpu/state.h"
#include "rwkv_jit/cpu/tokens.h"
#include "rwkv_jit/cpu/vector.h"
//% include "cpu_types.h"

namespace {

using namespace rwkv_jit;

struct Token {
  Row r, k, v, a, b, keep, change, y;
};

// Whether what surrounds the recurrence in a model is done here, too:
//   kk = normalize(k_k * k), gate = sigmoid(a0 + a), w <- w0 + w,
//   k <- k (1 + (gate - 1) k_a), a <- -kk, b <- kk gate.
constexpr bool FUSED = {{fused}};

template <typename Args>
void fuse(const Args& args, int64_t row, int64_t head, Token& token, Row& w) {
  alignas(64) Row w0, a0, k_k, k_a;
  load_mixed_row<Element, N>(args.w0, args.w0_dtype, head, reals(w0));
  load_mixed_row<Element, N>(args.a0, args.a0_dtype, head, reals(a0));
  load_mixed_row<Element, N>(args.k_k, args.k_k_dtype, head, reals(k_k));
  load_mixed_row<Element, N>(args.k_a, args.k_a_dtype, head, reals(k_a));
  for (int x = 0; x < VECTORS; ++x) {
    const Vector gate = sigmoid<Real, VECTOR_BYTES>(a0[x] + token.a[x]);
    w[x] += w0[x];
    token.a[x] = -k_k[x] * token.k[x];
    token.b[x] = -token.a[x] * gate;
    token.k[x] += token.k[x] * (gate - 1) * k_a[x];
  }
  const Real scale = 1 / std::max(std::sqrt(dot<Real, VECTORS>(token.a, token.a)), Real(1e-12));
  for (int x = 0; x < VECTORS; ++x) {
    token.a[x] *= scale;
    token.b[x] *= scale;
  }
  store_row<Element, N>(reals(token.k), args.new_k, row);
}

// Out of line, where the gate's constants stay in registers.
template <typename Args>
__attribute__((noinline)) void load_token(const Args& args, int64_t row, int64_t head,
                                          Token& token) {
  alignas(64) Row w;
  load_row<Element, N>(args.r, row, reals(token.r));
  load_row<Element, N>(args.k, row, reals(token.k));
  load_row<Element, N>(args.v, row, reals(token.v));
  load_row<Element, N>(args.a, row, reals(token.a));
  load_mixed_row<Element, N>(args.w, args.w_dtype, row, reals(w));
  if constexpr (FUSED) {
    fuse(args, row, head, token, w);
  } else {
    load_row<Element, N>(args.b, row, reals(token.b));
  }
  for (int x = 0; x < VECTORS; ++x) {
    const Gate gate(w[x]);
    token.keep[x] = gate.keep;
    token.change[x] = gate.change;
  }
}

// The results of a row that is skipped.
template <typename Args>
void skip_row(const Args& args, int64_t row) {
  clear_row<Element, N>(args.y, row);
  if constexpr (FUSED) clear_row<Element, N>(args.new_k, row);
}

// Takes COUNT rows, the first of which is row `first`, through a token.
template <int COUNT>
void advance_rows(Token& token, int first, Row* rows) {
  const Real* v = reals(token.v) + first;
  Vector sums[COUNT] = {}, y[COUNT] = {};
  for (int x = 0; x < VECTORS; ++x)
    for (int i = 0; i < COUNT; ++i) sums[i] += rows[i][x] * token.a[x];
  Real sa[COUNT];
  for (int i = 0; i < COUNT; ++i) sa[i] = lane_sum<Real, WIDTH>(sums[i]);
  for (int x = 0; x < VECTORS; ++x)
    for (int i = 0; i < COUNT; ++i) {
      Vector s = rows[i][x];
      s = s * token.keep[x] + (s * token.change[x] + (sa[i] * token.b[x] + v[i] * token.k[x]));
      rows[i][x] = s;
      y[i] += s * token.r[x];
    }
  for (int i = 0; i < COUNT; ++i) reals(token.y)[first + i] = lane_sum<Real, WIDTH>(y[i]);
}

// Takes COUNT vectors of rows, the first of which is row `first`, through a token; key by key.
template <int COUNT>
void advance_columns(Token& token, int first, Vector* columns) {
  const Vector* v = token.v + first / WIDTH;
  Vector sa[COUNT] = {}, y[COUNT] = {};
  for (int j = 0; j < N; ++j)
    for (int x = 0; x < COUNT; ++x) sa[x] += columns[j * COUNT + x] * reals(token.a)[j];
  for (int j = 0; j < N; ++j) {
    const Vector keep = splat<Vector>(reals(token.keep)[j]);
    const Vector change = splat<Vector>(reals(token.change)[j]);
    const Vector k = splat<Vector>(reals(token.k)[j]), b = splat<Vector>(reals(token.b)[j]);
    const Vector r = splat<Vector>(reals(token.r)[j]);
    for (int x = 0; x < COUNT; ++x) {
      Vector s = columns[j * COUNT + x];
      s = s * keep + (s * change + (sa[x] * b + v[x] * k));
      columns[j * COUNT + x] = s;
      y[x] += s * r;
    }
  }
  for (int x = 0; x < COUNT; ++x) token.y[first / WIDTH + x] = y[x];
}

}  // namespace

//% include "cpu_decode.h"
