// wkv7 backward on a CPU: sequences and heads in parallel, chunks from the last to the first.
//   G_t = dL/dS_t,   g_t = G_t + dy_t r_t^T,   dsa_t = g_t b_t
//   G_{t-1} = g_t diag(d_t) + dsa_t a_t^T
//   dr = S_t^T dy   dv = g k   dk = g^T v   db = g^T (S_{t-1} a)   da = S_{t-1}^T dsa
//   dd = sum over rows of g S_{t-1}, element by element
// Rows of S and G need nothing of each other but the sums over rows, which are gathered in order. A
// few rows at a time are taken forward through the chunk, from its checkpoint, which keeps their
// states in the nearest cache, and then backward. The decay is never divided by.
#include <cstdint>
#include <initializer_list>

//% include "prelude.h"
#include "rwkv_jit/cpu/decay.h"
#include "rwkv_jit/cpu/parallel.h"
#include "rwkv_jit/cpu/tokens.h"
#include "rwkv_jit/cpu/vector.h"
#include "rwkv_jit/cpu/state.h"
//% include "cpu_types.h"

namespace {

using namespace rwkv_jit;

constexpr int ROWS = 4;  // rows taken through a chunk together
static_assert(N % ROWS == 0, "rows come in groups");

// A thread's own memory: a chunk of tokens, its gradients, and one head's G [value, key].
struct Workspace {
  alignas(64) Row r[L], k[L], a[L], b[L], keep[L], change[L], slope[L];
  alignas(64) Row dr[L], dw[L], dk[L], da[L], db[L];
  alignas(64) Row history[L + 1][ROWS];  // S_{t-1} of the rows at hand; the last is S_L
  alignas(64) Row g[N];
  alignas(64) Row w;
  alignas(64) Real v[L][N], dy[L][N], dv[L][N];
};

void load_tokens(const Arguments& args, int64_t first, int count, int64_t head, Workspace& work) {
  for (int t = 0; t < count; ++t) {
    const int64_t row = (first + t) * args.H + head;
    load_row<Element, N>(args.r, row, reals(work.r[t]));
    load_row<Element, N>(args.k, row, reals(work.k[t]));
    load_row<Element, N>(args.v, row, work.v[t]);
    load_row<Element, N>(args.a, row, reals(work.a[t]));
    load_row<Element, N>(args.b, row, reals(work.b[t]));
    load_row<Element, N>(args.dy, row, work.dy[t]);
    load_mixed_row<Element, N>(args.w, args.w_dtype, row, reals(work.w));
    for (int x = 0; x < VECTORS; ++x) {
      const Gate gate(work.w[x]);
      work.keep[t][x] = gate.keep;
      work.change[t][x] = gate.change;
      work.slope[t][x] = gate.slope;
    }
    for (int x = 0; x < VECTORS; ++x)
      work.dr[t][x] = work.dw[t][x] = work.dk[t][x] = work.da[t][x] = work.db[t][x] = Vector{};
  }
}

// Takes rows first .. first + ROWS through `count` tokens forward, then backward, and asks for its
// share of the chunk whose tokens begin at row `next` of the inputs.
void run_rows(const Arguments& args, int64_t next, Workspace& work, int first, int count) {
  Real sa[L][ROWS];
  for (int t = 0; t < count; ++t) {
    for (const void* tensor : {args.r, args.w, args.k, args.v, args.a, args.b, args.dy})
      prefetch_values<Element, ROWS>(tensor, (next + t * args.H) * N + first);
    for (int i = 0; i < ROWS; ++i) sa[t][i] = dot<Real, VECTORS>(work.history[t][i], work.a[t]);
    const Real *v = work.v[t] + first, *dy = work.dy[t] + first;
    for (int x = 0; x < VECTORS; ++x) {
      Vector dr = work.dr[t][x];
      for (int i = 0; i < ROWS; ++i) {
        const Vector s = work.history[t][i][x];
        const Vector next = s * work.keep[t][x] + (s * work.change[t][x] +
                                                   (sa[t][i] * work.b[t][x] + v[i] * work.k[t][x]));
        work.history[t + 1][i][x] = next;
        dr += next * dy[i];
      }
      work.dr[t][x] = dr;
    }
  }
  Row* g = work.g + first;
  for (int t = count - 1; t >= 0; --t) {
    const Real *v = work.v[t] + first, *dy = work.dy[t] + first;
    Real dsa[ROWS];
    for (int i = 0; i < ROWS; ++i) {
      Vector dv_sum = {}, dsa_sum = {};
      for (int x = 0; x < VECTORS; ++x) {
        const Vector sum = g[i][x] + work.r[t][x] * dy[i];
        g[i][x] = sum;
        dv_sum += sum * work.k[t][x];
        dsa_sum += sum * work.b[t][x];
      }
      work.dv[t][first + i] = lane_sum<Real, WIDTH>(dv_sum);
      dsa[i] = lane_sum<Real, WIDTH>(dsa_sum);
    }
    for (int x = 0; x < VECTORS; ++x) {
      Vector dw = work.dw[t][x], dk = work.dk[t][x], da = work.da[t][x], db = work.db[t][x];
      const Vector a = work.a[t][x], keep = work.keep[t][x], change = work.change[t][x];
      for (int i = 0; i < ROWS; ++i) {
        const Vector sum = g[i][x], s = work.history[t][i][x];
        dw += sum * s;
        dk += sum * v[i];
        da += s * dsa[i];
        db += sum * sa[t][i];
        g[i][x] = sum * keep + (sum * change + a * dsa[i]);
      }
      work.dw[t][x] = dw, work.dk[t][x] = dk, work.da[t][x] = da, work.db[t][x] = db;
    }
  }
}

void store_gradients(const Arguments& args, int64_t first, int count, int64_t head,
                     Workspace& work) {
  for (int t = 0; t < count; ++t) {
    const int64_t row = (first + t) * args.H + head;
    for (int x = 0; x < VECTORS; ++x) work.dw[t][x] *= work.slope[t][x];
    store_row<Element, N>(reals(work.dr[t]), args.dr, row);
    store_row<Element, N>(reals(work.dk[t]), args.dk, row);
    store_row<Element, N>(work.dv[t], args.dv, row);
    store_row<Element, N>(reals(work.da[t]), args.da, row);
    store_row<Element, N>(reals(work.db[t]), args.db, row);
    store_mixed_row<Element, N>(reals(work.dw[t]), args.dw, args.dw_dtype, row);
  }
}

}  // namespace

//% include "cpu_backward.h"

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_heads<Workspace>(*args, N * N * 16, run_backward);
}
