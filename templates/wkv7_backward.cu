// wkv7 backward, token by token, in float.
//   G_t = dL/dS_t,   g_t = G_t + dy_t r_t^T,   dsa_t = g_t b_t
//   G_{t-1} = g_t diag(d_t) + dsa_t a_t^T
//   dr = S_t^T dy   dv = g k   dk = g^T v   db = g^T (S_{t-1} a)   da = S_{t-1}^T dsa
//   dd = sum over rows of g S_{t-1}, element by element
// Sums over rows: in the warp by halving, then over warps in order.
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/decay.cuh"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/recurrence.cuh"
//% include "cuda_types.h"
//% include "cuda_tiles.h"

namespace {

using namespace rwkv_jit;

constexpr int STEP = {{step_tokens}};
static_assert(L % STEP == 0, "a chunk is a whole number of steps");

enum Vector { R, K, V, A, B, DY, KEEP, CHANGE, SLOPE, VECTORS };
enum Gradient { DR, DW, DK, DA, DB, GRADIENTS };  // those that are sums over rows

struct Shared {
  float tokens[STEP][VECTORS][N];
  float sums[WARPS][STEP][GRADIENTS][N];  // each warp's part
};

// One value of each vector of a token.
__device__ __forceinline__ void load_token(const Arguments& args, int64_t t, int64_t head, int j,
                                           float (&token)[VECTORS][N]) {
  const int64_t from = (t * args.H + head) * N + j;
  const Decay decay = decay_of<DECAY>(load_mixed<Element>(args.w, args.w_dtype, from));
  token[R][j] = load_at<Element>(args.r, from);
  token[K][j] = load_at<Element>(args.k, from);
  token[V][j] = load_at<Element>(args.v, from);
  token[A][j] = load_at<Element>(args.a, from);
  token[B][j] = load_at<Element>(args.b, from);
  token[DY][j] = load_at<Element>(args.dy, from);
  token[KEEP][j] = decay.keep;
  token[CHANGE][j] = decay.change;
  token[SLOPE][j] = decay.slope;
}

__device__ __forceinline__ void advance_state(const Tile<N>& tile, const float (&token)[VECTORS][N],
                                              const float (&v)[ROWS],
                                              float (&state)[ROWS][LANE_COLUMNS],
                                              float (&sa)[ROWS]) {
  state_times(tile, state, token[A], sa);
  advance(tile, state, sa, v, token[KEEP], token[CHANGE], token[B], token[K]);
}
__device__ __forceinline__ void advance_state(const Tile<N>& tile, const float (&token)[VECTORS][N],
                                              const float (&v)[ROWS],
                                              float (&state)[ROWS][LANE_COLUMNS]) {
  float sa[ROWS];
  advance_state(tile, token, v, state, sa);
}

// Adds up the warps' parts and writes the gradients of a step's tokens.
__device__ __forceinline__ void store_gradients(const Arguments& args, int64_t first, int64_t end,
                                                int64_t head, const Shared& shared) {
  __syncthreads();  // every warp's part is there
  for (int at = threadIdx.x; at < STEP * N; at += THREADS) {
    const int t = at / N, j = at % N;
    if (first + t >= end) continue;
    float sums[GRADIENTS] = {};
    for (int warp = 0; warp < WARPS; ++warp)
#pragma unroll
      for (int gradient = 0; gradient < GRADIENTS; ++gradient)
        sums[gradient] += shared.sums[warp][t][gradient][j];
    const int64_t to = ((first + t) * args.H + head) * N + j;
    const float dw = sums[DW] * shared.tokens[t][SLOPE][j];
    store_at<Element>(args.dr, to, sums[DR]);
    store_at<Element>(args.dk, to, sums[DK]);
    store_at<Element>(args.da, to, sums[DA]);
    store_at<Element>(args.db, to, sums[DB]);
    store_mixed<Element>(args.dw, args.dw_dtype, to, dw);
  }
}

// A step of one group of rows: forward from `state`, then `g` backward. FIRST writes the sums over
// rows, the groups after it add to them.
template <bool FIRST>
__device__ __forceinline__ void run_step(const Arguments& args, const Tile<N>& tile, int64_t first,
                                         int64_t end, int64_t head, int first_row,
                                         float (&state)[ROWS][LANE_COLUMNS],
                                         float (&g)[ROWS][LANE_COLUMNS], Shared& shared) {
  float (&sums)[STEP][GRADIENTS][N] = shared.sums[threadIdx.x / 32];
  float history[STEP][ROWS][LANE_COLUMNS], sa[STEP][ROWS];
#pragma unroll
  for (int t = 0; t < STEP; ++t) {
    float (&token)[VECTORS][N] = shared.tokens[t];
    float v[ROWS], dy[ROWS], dr[LANE_COLUMNS] = {};
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      v[i] = token[V][first_row + i];
      dy[i] = token[DY][first_row + i];
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) history[t][i][j] = state[i][j];
    }
    advance_state(tile, token, v, state, sa[t]);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) dr[j] = fmaf(state[i][j], dy[i], dr[j]);
    tile.column_sum<!FIRST>(dr, sums[t][DR]);
  }
#pragma unroll
  for (int t = STEP - 1; t >= 0; --t) {
    float (&token)[VECTORS][N] = shared.tokens[t];
    float dv[ROWS], dsa[ROWS], row[LANE_COLUMNS];
    tile.read(token[R], row);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const float dy = token[DY][first_row + i];
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) g[i][j] = fmaf(dy, row[j], g[i][j]);
    }
    state_times(tile, g, token[K], dv);
    state_times(tile, g, token[B], dsa);
    if (tile.column_lane == 0 && first + t < end) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
        store_at<Element>(args.dv, ((first + t) * args.H + head) * N + first_row + i, dv[i]);
    }
    float dw[LANE_COLUMNS] = {}, dk[LANE_COLUMNS] = {}, da[LANE_COLUMNS] = {},
          db[LANE_COLUMNS] = {};
    float keep[LANE_COLUMNS], change[LANE_COLUMNS];
    tile.read(token[A], row);
    tile.read(token[KEEP], keep);
    tile.read(token[CHANGE], change);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const float v = token[V][first_row + i];
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) {
        const float sum = g[i][j], s = history[t][i][j];
        dw[j] = fmaf(sum, s, dw[j]);
        dk[j] = fmaf(sum, v, dk[j]);
        da[j] = fmaf(s, dsa[i], da[j]);
        db[j] = fmaf(sum, sa[t][i], db[j]);
        g[i][j] = fmaf(sum, keep[j], fmaf(sum, change[j], dsa[i] * row[j]));
      }
    }
    tile.column_sum<!FIRST>(dw, sums[t][DW]);
    tile.column_sum<!FIRST>(dk, sums[t][DK]);
    tile.column_sum<!FIRST>(da, sums[t][DA]);
    tile.column_sum<!FIRST>(db, sums[t][DB]);
  }
}

}  // namespace

//% include "cuda_backward.h"

namespace {

__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const Arguments args) {
  extern __shared__ __align__(16) char shared_bytes[];
  walk_back(args, blockIdx.x, *reinterpret_cast<Shared*>(shared_bytes));
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return launch_heads(*args, backward_kernel);
}
