// wkv7 forward on a CPU: sequences and heads in parallel, each token by token.
//   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t
// Rows of S need nothing of each other, so a block of rows takes all tokens of a chunk while it
// lies in the nearest cache. One pass over the block advances it by a token and also gathers S_t
// r_t and the next token's S_t a_{t+1}.
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

//% include "prelude.h"
#include "rwkv_jit/cpu/decay.h"
#include "rwkv_jit/cpu/parallel.h"
#include "rwkv_jit/cpu/tokens.h"
#include "rwkv_jit/cpu/vector.h"
#include "rwkv_jit/cpu/wkv7_state.h"
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
    load_decay_row<Element, N>(args.w, args.w_dtype, row, work.w);
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

template <bool ALL_KEEP>
void advance(const Arguments& args, int64_t next, Workspace& work, int count) {
  constexpr int REMAINDER = N % BLOCK_ROWS / WIDTH;
  for (int row = 0; row + BLOCK_ROWS <= N; row += BLOCK_ROWS)
    advance_rows<BLOCK_VECTORS, ALL_KEEP>(args, next, work, row, count);
  if constexpr (REMAINDER > 0)
    advance_rows<REMAINDER, ALL_KEEP>(args, next, work, N - REMAINDER * WIDTH, count);
}

void load_state(const Arguments& args, int64_t at, Workspace& work) {
  const StateElement* from = static_cast<const StateElement*>(args.initial_state);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j)
      work.state[packed_index<N, BLOCK_ROWS>(i, j)] =
          from == nullptr ? Real(0) : load(from[at * N * N + state_index<N, STATE_IS_KV>(i, j)]);
}

void store_state(const Arguments& args, int64_t at, const Workspace& work) {
  StateElement* to = static_cast<StateElement*>(args.final_state);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j)
      store(to[at * N * N + state_index<N, STATE_IS_KV>(i, j)],
            work.state[packed_index<N, BLOCK_ROWS>(i, j)]);
}

void store_checkpoint(const Arguments& args, int64_t place, int64_t head, const Workspace& work) {
  if (args.checkpoints == nullptr) return;
  Real* to = static_cast<Real*>(args.checkpoints) + (place * args.H + head) * N * N;
  std::copy_n(work.state, N * N, to);
}

void run_head(const Arguments& args, int64_t s, int64_t head, Workspace& work) {
  const Sequence sequence = find_sequence(args, s, L);
  load_state(args, s * args.H + head, work);
  int64_t checkpoint = sequence.first_checkpoint;
  for (int64_t first = sequence.begin; first < sequence.end; first += L, ++checkpoint) {
    const int count = static_cast<int>(std::min<int64_t>(L, sequence.end - first));
    store_checkpoint(args, checkpoint, head, work);
    load_tokens(args, first, count, head, work);
    const int64_t next = (first + L) * args.H + head;
    work.all_keep ? advance<true>(args, next, work, count)
                  : advance<false>(args, next, work, count);
    for (int t = 0; t < count; ++t)
      store_row<Element, N>(work.y[t], args.y, (first + t) * args.H + head);
  }
  // A place that no chunk needs is written all the same, so that no output is left undefined.
  if (checkpoint < sequence.first_checkpoint + sequence.checkpoints)
    store_checkpoint(args, checkpoint, head, work);
  if (args.final_state != nullptr) store_state(args, s * args.H + head, work);
}

}  // namespace

RWKV_JIT_EXPORT const char* rwkv_jit_error(int) { return "out of memory"; }

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t heads = args->S * args->H;
  const double tokens = args->cu_seqlens != nullptr ? double(args->T) / args->S : double(args->T);
  const int64_t workers = useful_threads(args->threads, heads, (tokens + 1) * N * N * 6);
  try {
    std::vector<std::unique_ptr<Workspace>> work(workers);
    for (auto& one : work) one = std::make_unique<Workspace>();
    parallel_for(heads, workers, [&](int64_t item, int64_t worker) {
      run_head(*args, item / args->H, item % args->H, *work[worker]);
    });
  } catch (const std::bad_alloc&) {
    return 1;
  }
  return 0;
}
