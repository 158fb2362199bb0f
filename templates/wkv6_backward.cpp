// wkv6 and wkv5 backward on a CPU: sequences and heads in parallel, chunks from the last to the
// first.
//   G_t = dL/dS_t,   c_t = dy_t . v_t,   G_{t-1} = G_t diag(d_t) + dy_t r_t^T
//   dr = S_{t-1}^T dy + c u * k   dk = G^T v + c u * r   dv = G k + ((u * k) . r) dy
//   du = sum over tokens of c r * k   dd = sum over rows of G_t S_{t-1}, element by element
// Rows of S and G need nothing of each other but the sums over rows, which are gathered in order. A
// few rows at a time are taken forward through the chunk, from its checkpoint, which keeps their
// states in the nearest cache, and then backward. The decay is never divided by.
#include <cstdint>
#include <initializer_list>

//% include "prelude.h"
#include "rwkv_jit/cpu/decay.h"
#include "rwkv_jit/cpu/parallel.h"
#include "rwkv_jit/cpu/state.h"
#include "rwkv_jit/cpu/tokens.h"
#include "rwkv_jit/cpu/vector.h"
#include "rwkv_jit/sum.h"
//% include "cpu_types.h"
//% include "wkv6_tokens.h"

namespace {

using namespace rwkv_jit;

constexpr int GATES = DECAY_PER_TOKEN ? L : 1;

inline int gate_at(int t) { return DECAY_PER_TOKEN ? t : 0; }

constexpr int ROWS = 4;  // rows taken through a chunk together
static_assert(N % ROWS == 0, "rows come in groups");

// A thread's own memory: a chunk of tokens, its gradients, one head's G [value, key], and what a
// head sums over its tokens.
struct Workspace {
  alignas(64) Row r[L], k[L], keep[GATES], change[GATES], slope[GATES];
  alignas(64) Row dr[L], dw[L], dk[L];
  alignas(64) Row history[L + 1][ROWS];  // S_{t-1} of the rows at hand; the last is S_L
  alignas(64) Row g[N];
  alignas(64) Row u, w;
  alignas(64) Row v[L], dy[L], dv[L];
  alignas(64) Row du_sum, du_rest, dw_sum, dw_rest;
  bool all_keep;
};

// The decays of a chunk, and whether every keep is 1.
void load_gates(const Arguments& args, int64_t first, int count, int64_t head, Workspace& work) {
  Vector least_keep = splat<Vector>(Real(1));
  for (int t = 0; t < (DECAY_PER_TOKEN ? count : 1); ++t) {
    const int64_t row = decay_row((first + t) * args.H + head, head);
    load_mixed_row<Element, N>(args.w, args.w_dtype, row, reals(work.w));
    for (int x = 0; x < VECTORS; ++x) {
      const Gate gate(work.w[x]);
      work.keep[t][x] = gate.keep;
      work.change[t][x] = gate.change;
      least_keep = gate.keep < least_keep ? gate.keep : least_keep;
      work.slope[t][x] = gate.slope;
    }
  }
  work.all_keep = true;
  for (int lane = 0; lane < WIDTH; ++lane) work.all_keep &= least_keep[lane] == 1;
}

void load_tokens(const Arguments& args, int64_t first, int count, int64_t head, Workspace& work) {
  for (int t = 0; t < count; ++t) {
    const int64_t row = (first + t) * args.H + head;
    load_row<Element, N>(args.r, row, reals(work.r[t]));
    load_row<Element, N>(args.k, row, reals(work.k[t]));
    load_row<Element, N>(args.v, row, reals(work.v[t]));
    load_row<Element, N>(args.dy, row, reals(work.dy[t]));
    for (int x = 0; x < VECTORS; ++x) work.dr[t][x] = work.dw[t][x] = work.dk[t][x] = Vector{};
  }
  load_gates(args, first, count, head, work);
}

// Takes rows first .. first + ROWS through `count` tokens forward, then backward, and asks for its
// share of the chunk whose tokens begin at row `next` of the inputs.
template <bool ALL_KEEP>
void run_some(const Arguments& args, int64_t next, Workspace& work, int first, int count) {
  for (int t = 0; t < count; ++t) {
    prefetch_tokens<ROWS>(args, {args.r, args.k, args.v, args.dy}, next + t * args.H, first);
    const Real *v = reals(work.v[t]) + first, *dy = reals(work.dy[t]) + first;
    for (int x = 0; x < VECTORS; ++x) {
      const Vector keep = work.keep[gate_at(t)][x], change = work.change[gate_at(t)][x];
      const Vector k = work.k[t][x];
      Vector dr = work.dr[t][x];
      for (int i = 0; i < ROWS; ++i) {
        const Vector s = work.history[t][i][x];
        dr += s * dy[i];
        work.history[t + 1][i][x] = (ALL_KEEP ? s : s * keep) + (s * change + k * v[i]);
      }
      work.dr[t][x] = dr;
    }
  }
  Row* g = work.g + first;
  for (int t = count - 1; t >= 0; --t) {
    const Real *v = reals(work.v[t]) + first, *dy = reals(work.dy[t]) + first;
    Vector dv[ROWS] = {};
    for (int x = 0; x < VECTORS; ++x) {
      const Vector keep = work.keep[gate_at(t)][x], change = work.change[gate_at(t)][x];
      const Vector r = work.r[t][x], k = work.k[t][x];
      Vector dw = work.dw[t][x], dk = work.dk[t][x];
      for (int i = 0; i < ROWS; ++i) {
        const Vector after = g[i][x];
        dw += after * work.history[t][i][x];
        dk += after * v[i];
        dv[i] += after * k;
        g[i][x] = (ALL_KEEP ? after : after * keep) + (after * change + r * dy[i]);
      }
      work.dw[t][x] = dw, work.dk[t][x] = dk;
    }
    for (int i = 0; i < ROWS; ++i) reals(work.dv[t])[first + i] = lane_sum<Real, WIDTH>(dv[i]);
  }
}

void run_rows(const Arguments& args, int64_t next, Workspace& work, int first, int count) {
  work.all_keep ? run_some<true>(args, next, work, first, count)
                : run_some<false>(args, next, work, first, count);
}

void store_gradients(const Arguments& args, int64_t first, int count, int64_t head,
                     Workspace& work) {
  for (int t = count - 1; t >= 0; --t) {
    const int64_t row = (first + t) * args.H + head;
    const Real c = dot<Real, VECTORS>(work.dy[t], work.v[t]);
    Vector bonus = {};
    for (int x = 0; x < VECTORS; ++x) {
      const Vector r = work.r[t][x], k = work.k[t][x], u = work.u[x];
      bonus += u * k * r;
      work.dr[t][x] += c * (u * k);
      work.dk[t][x] += c * (u * r);
      add_long(c * (r * k), work.du_sum[x], work.du_rest[x]);
      if (DECAY_PER_TOKEN) {
        work.dw[t][x] *= work.slope[gate_at(t)][x];
      } else {
        add_long(work.dw[t][x], work.dw_sum[x], work.dw_rest[x]);
      }
    }
    const Real scale = lane_sum<Real, WIDTH>(bonus);
    for (int x = 0; x < VECTORS; ++x) work.dv[t][x] += scale * work.dy[t][x];
    store_row<Element, N>(reals(work.dr[t]), args.dr, row);
    store_row<Element, N>(reals(work.dk[t]), args.dk, row);
    store_row<Element, N>(reals(work.dv[t]), args.dv, row);
    if (DECAY_PER_TOKEN)
      store_mixed_row<Element, N>(reals(work.dw[t]), args.dw, args.dw_dtype, row);
  }
}

}  // namespace

//% include "cpu_backward.h"

namespace {

// A head's parts of what is summed over all sequences.
template <typename Args>
void store_parts(const Args& args, int64_t s, int64_t head, Workspace& work) {
  store_row<Real, N>(reals(work.du_sum), args.du_parts, s * args.H + head);
  if constexpr (!DECAY_PER_TOKEN) {
    load_mixed_row<Element, N>(args.w, args.w_dtype, head, reals(work.w));
    for (int x = 0; x < VECTORS; ++x) {
      const Gate gate(work.w[x]);
      work.dw_sum[x] *= gate.slope;
    }
    store_row<Real, N>(reals(work.dw_sum), args.dw_parts, s * args.H + head);
  }
}

void run_head(const Arguments& args, int64_t s, int64_t head, Workspace& work) {
  load_mixed_row<Element, N>(args.u, args.u_dtype, head, reals(work.u));
  for (Row* row : {&work.du_sum, &work.du_rest, &work.dw_sum, &work.dw_rest})
    std::fill_n(*row, VECTORS, Vector{});
  run_backward(args, s, head, work);
  store_parts(args, s, head, work);
}

// Sums [S, H, N] over the sequences, in their order.
void sum_sequences(const Arguments& args, const void* parts, void* to, int32_t dtype) {
  for (int64_t head = 0; head < args.H; ++head) {
    Row row, sum = {}, rest = {};
    for (int64_t s = 0; s < args.S; ++s) {
      load_row<Real, N>(parts, s * args.H + head, reals(row));
      for (int x = 0; x < VECTORS; ++x) add_long(row[x], sum[x], rest[x]);
    }
    store_mixed_row<Element, N>(reals(sum), to, dtype, head);
  }
}

template <typename Args>
void sum_parts(const Args& args) {
  sum_sequences(args, args.du_parts, args.du, args.du_dtype);
  if constexpr (!DECAY_PER_TOKEN) sum_sequences(args, args.dw_parts, args.dw, args.dw_dtype);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int code = run_heads<Workspace>(*args, N * N * 10, run_head);
  if (code == 0) sum_parts(*args);
  return code;
}
