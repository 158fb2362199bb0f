// wkv7 forward on a CPU: sequences and heads in parallel, each token by token.
//   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t
// Rows of S need nothing of each other, so a block of rows takes all tokens of a chunk while it
// lies in the nearest cache. One pass over the block advances it by a token and also gathers S_t
// r_t and the next token's S_t a_{t+1}.
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

// A thread's own memory: a chunk of tokens, converted, and one head's state.
struct Workspace {
  alignas(64) Real r[L][N], k[L][N], v[L][N], b[L][N], keep[L][N], change[L][N], y[L][N];
  alignas(64) Real a[L + 1][N] = {};  // the last token's successor is not known: zeros
  alignas(64) Real w[N];
  alignas(64) Real state[N * N];
  bool all_keep;
};

// Out of line, where the gate's constants stay in registers.
__attribute__((noinline)) void load_tokens(const Arguments& args, int64_t first, int count,
                                           int64_t head, Workspace& work) {
  Vector least_keep = splat<Vector>(Real(1));
  for (int t = 0; t < count; ++t) {
    const int64_t row = (first + t) * args.H + head;
    load_row<Element, N>(args.r, row, work.r[t]);
    load_row<Element, N>(args.k, row, work.k[t]);
    load_row<Element, N>(args.v, row, work.v[t]);
    load_row<Element, N>(args.a, row, work.a[t]);
    load_row<Element, N>(args.b, row, work.b[t]);
    load_mixed_row<Element, N>(args.w, args.w_dtype, row, work.w);
    Vector* keep = reinterpret_cast<Vector*>(work.keep[t]);
    Vector* change = reinterpret_cast<Vector*>(work.change[t]);
    for (int x = 0; x < N / WIDTH; ++x) {
      const Gate gate(reinterpret_cast<const Vector*>(work.w)[x]);
      keep[x] = gate.keep;
      change[x] = gate.change;
      least_keep = gate.keep < least_keep ? gate.keep : least_keep;
    }
  }
  work.all_keep = true;
  for (int lane = 0; lane < WIDTH; ++lane) work.all_keep &= least_keep[lane] == 1;
}

// Takes VECTORS vectors of rows, beginning at row `first`, through `count` tokens, and asks for its
// share of the chunk whose tokens begin at row `next` of the inputs. Where every keep is 1, adding
// is the same as multiplying by it, and faster.
template <int VECTORS, bool ALL_KEEP>
void advance_rows(const Arguments& args, int64_t next, Workspace& work, int first, int count) {
  Vector* state = reinterpret_cast<Vector*>(work.state + static_cast<int64_t>(first) * N);
  Vector sa[VECTORS] = {};
  for (int j = 0; j < N; ++j)
    for (int x = 0; x < VECTORS; ++x) sa[x] += state[j * VECTORS + x] * work.a[0][j];
  for (int t = 0; t < count; ++t) {
    for (const void* tensor : {args.r, args.w, args.k, args.v, args.a, args.b})
      prefetch_values<Element, VECTORS * WIDTH>(tensor, (next + t * args.H) * N + first);
    const Vector* v = reinterpret_cast<const Vector*>(work.v[t] + first);
    Vector value[VECTORS], y[VECTORS] = {}, next_sa[VECTORS] = {};
    for (int x = 0; x < VECTORS; ++x) value[x] = v[x];
    for (int j = 0; j < N; ++j) {
      const Vector keep = splat<Vector>(work.keep[t][j]), change = splat<Vector>(work.change[t][j]);
      const Vector k = splat<Vector>(work.k[t][j]), b = splat<Vector>(work.b[t][j]);
      const Vector r = splat<Vector>(work.r[t][j]), next_a = splat<Vector>(work.a[t + 1][j]);
      for (int x = 0; x < VECTORS; ++x) {
        Vector s = state[j * VECTORS + x];
        s = (ALL_KEEP ? s : s * keep) + (s * change + (sa[x] * b + value[x] * k));
        state[j * VECTORS + x] = s;
        y[x] += s * r;
        next_sa[x] += s * next_a;
      }
    }
    Vector* out = reinterpret_cast<Vector*>(work.y[t] + first);
    for (int x = 0; x < VECTORS; ++x) {
      out[x] = y[x];
      sa[x] = next_sa[x];
    }
  }
}

}  // namespace

//% include "cpu_forward.h"

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return run_forwards(*args, N * N * 6);
}
