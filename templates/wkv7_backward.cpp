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

constexpr int ROWS = 4;  // rows taken through a chunk together
constexpr int VECTORS = N / WIDTH;
static_assert(N % ROWS == 0, "rows come in groups");

using Row = Vector[VECTORS];

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
    load_decay_row<Element, N>(args.w, args.w_dtype, row, reals(work.w));
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

Real dot(const Row& left, const Row& right) {
  Vector sum = {};
  for (int x = 0; x < VECTORS; ++x) sum += left[x] * right[x];
  return lane_sum<Real, WIDTH>(sum);
}

// Takes rows first .. first + ROWS through `count` tokens forward, then backward, and asks for its
// share of the chunk whose tokens begin at row `next` of the inputs.
void run_rows(const Arguments& args, int64_t next, Workspace& work, int first, int count) {
  Real sa[L][ROWS];
  for (int t = 0; t < count; ++t) {
    for (const void* tensor : {args.r, args.w, args.k, args.v, args.a, args.b, args.dy})
      prefetch_values<Element, ROWS>(tensor, (next + t * args.H) * N + first);
    for (int i = 0; i < ROWS; ++i) sa[t][i] = dot(work.history[t][i], work.a[t]);
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
    if (args.dw_dtype == FP32) {
      store_row<float, N>(reals(work.dw[t]), args.dw, row);
    } else {
      store_row<Element, N>(reals(work.dw[t]), args.dw, row);
    }
  }
}

void run_head(const Arguments& args, int64_t s, int64_t head, Workspace& work) {
  const Sequence sequence = find_sequence(args, s, L);
  const int64_t state_at = (s * args.H + head) * N * N;
  const StateElement* dfinal = static_cast<const StateElement*>(args.dfinal_state);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j)
      reals(work.g[i])[j] =
          dfinal == nullptr ? Real(0) : load(dfinal[state_at + state_index<N, STATE_IS_KV>(i, j)]);

  const int64_t chunks = (sequence.end - sequence.begin + L - 1) / L;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t first = sequence.begin + chunk * L;
    const int count = static_cast<int>(std::min<int64_t>(L, sequence.end - first));
    load_tokens(args, first, count, head, work);
    const Real* checkpoint = static_cast<const Real*>(args.checkpoints) +
                             ((sequence.first_checkpoint + chunk) * args.H + head) * N * N;
    for (int row = 0; row < N; row += ROWS) {
      for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < N; ++j)
          reals(work.history[0][i])[j] = checkpoint[packed_index<N, BLOCK_ROWS>(row + i, j)];
      run_rows(args, (first - L) * args.H + head, work, row, count);
    }
    store_gradients(args, first, count, head, work);
  }

  StateElement* dinitial = static_cast<StateElement*>(args.dinitial_state);
  if (dinitial == nullptr) return;
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j)
      store(dinitial[state_at + state_index<N, STATE_IS_KV>(i, j)], reals(work.g[i])[j]);
}

}  // namespace

RWKV_JIT_EXPORT const char* rwkv_jit_error(int) { return "out of memory"; }

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t heads = args->S * args->H;
  const double tokens = args->cu_seqlens != nullptr ? double(args->T) / args->S : double(args->T);
  const int64_t workers = useful_threads(args->threads, heads, (tokens + 1) * N * N * 16);
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
