// wkv6 and wkv5 backward, token by token, in float.
//   G_t = dL/dS_t,   c_t = dy_t . v_t,   G_{t-1} = G_t diag(d_t) + dy_t r_t^T
//   dr = S_{t-1}^T dy + c u * k   dk = G^T v + c u * r   dv = G k + ((u * k) . r) dy
//   du = sum over tokens of c r * k   dd = sum over rows of G_t S_{t-1}, element by element
// Sums over rows: in the warp by halving, then over warps in order. Sums over tokens: by the thread
// of a channel, and over sequences, in their order, by a second kernel.
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/decay.cuh"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/recurrence.cuh"
#include "rwkv_jit/sum.h"
//% include "cuda_types.h"
//% include "cuda_tiles.h"
//% include "wkv6_decay.h"

namespace {

using namespace rwkv_jit;

constexpr int STEP = {{step_tokens}};
static_assert(L % STEP == 0, "a chunk is a whole number of steps");

enum Vector { R, K, V, UK, DY, KEEP, CHANGE, SLOPE, VECTORS };  // UK is u * k
enum Gradient { DR, DW, DK, GRADIENTS };                        // those that are sums over rows

struct Shared {
  float tokens[STEP][VECTORS][N];
  float sums[WARPS][STEP][GRADIENTS][N];       // each warp's part
  float c[WARPS][STEP];                        // and of c
  float du[N], du_rest[N], dw[N], dw_rest[N];  // over tokens; dw where the decay is one for all
};

// One value of each vector of a token.
__device__ __forceinline__ void load_token(const Arguments& args, int64_t t, int64_t head, int j,
                                           float (&token)[VECTORS][N]) {
  const int64_t row = t * args.H + head, from = row * N + j;
  const Decay decay =
      decay_of<DECAY>(load_mixed<Element>(args.w, args.w_dtype, decay_row(row, head) * N + j));
  const float k = load_at<Element>(args.k, from);
  token[R][j] = load_at<Element>(args.r, from);
  token[K][j] = k;
  token[V][j] = load_at<Element>(args.v, from);
  token[UK][j] = load_mixed<Element>(args.u, args.u_dtype, head * N + j) * k;
  token[DY][j] = load_at<Element>(args.dy, from);
  token[KEEP][j] = decay.keep;
  token[CHANGE][j] = decay.change;
  token[SLOPE][j] = decay.slope;
}

__device__ __forceinline__ void advance_state(const Tile<N>& tile, const float (&token)[VECTORS][N],
                                              const float (&v)[ROWS],
                                              float (&state)[ROWS][LANE_COLUMNS]) {
  advance(tile, state, v, token[KEEP], token[CHANGE], token[K]);
}

// Adds up the warps' parts, writes the gradients of a step's tokens and adds to the sums over
// tokens.
__device__ __forceinline__ void store_gradients(const Arguments& args, int64_t first, int64_t end,
                                                int64_t head, Shared& shared) {
  __syncthreads();  // every warp's part is there
  const auto over_warps = [&](int t, int gradient, int j) {
    float sum = 0;
    for (int warp = 0; warp < WARPS; ++warp) sum += shared.sums[warp][t][gradient][j];
    return sum;
  };
  const auto c_of = [&](int t) {
    float sum = 0;
    for (int warp = 0; warp < WARPS; ++warp) sum += shared.c[warp][t];
    return sum;
  };
  for (int at = threadIdx.x; at < STEP * N; at += THREADS) {
    const int t = at / N, j = at % N;
    if (first + t >= end) continue;
    const float (&token)[VECTORS][N] = shared.tokens[t];
    const int64_t to = ((first + t) * args.H + head) * N + j;
    const float c = c_of(t), u = load_mixed<Element>(args.u, args.u_dtype, head * N + j);
    store_at<Element>(args.dr, to, fmaf(c, token[UK][j], over_warps(t, DR, j)));
    store_at<Element>(args.dk, to, fmaf(c, u * token[R][j], over_warps(t, DK, j)));
    if constexpr (DECAY_PER_TOKEN)
      store_mixed<Element>(args.dw, args.dw_dtype, to, over_warps(t, DW, j) * token[SLOPE][j]);
  }
  for (int j = threadIdx.x; j < N; j += THREADS)
    for (int t = STEP - 1; t >= 0; --t) {
      if (first + t >= end) continue;
      add_long(c_of(t) * shared.tokens[t][R][j] * shared.tokens[t][K][j], shared.du[j],
               shared.du_rest[j]);
      if constexpr (!DECAY_PER_TOKEN)
        add_long(over_warps(t, DW, j), shared.dw[j], shared.dw_rest[j]);
    }
}

// A step of one group of rows: forward from `state`, then `g` backward. FIRST writes the sums over
// rows, the groups after it add to them.
template <bool FIRST>
__device__ __forceinline__ void run_step(const Arguments& args, const Tile<N>& tile, int64_t first,
                                         int64_t end, int64_t head, int first_row,
                                         float (&state)[ROWS][LANE_COLUMNS],
                                         float (&g)[ROWS][LANE_COLUMNS], Shared& shared) {
  const int warp = threadIdx.x / 32;
  float (&sums)[STEP][GRADIENTS][N] = shared.sums[warp];
  float history[STEP][ROWS][LANE_COLUMNS];
#pragma unroll
  for (int t = 0; t < STEP; ++t) {
    const float (&token)[VECTORS][N] = shared.tokens[t];
    float v[ROWS], c = 0, dr[LANE_COLUMNS] = {};
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const float dy = token[DY][first_row + i];
      v[i] = token[V][first_row + i];
      c = fmaf(v[i], dy, c);
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) {
        history[t][i][j] = state[i][j];
        dr[j] = fmaf(state[i][j], dy, dr[j]);
      }
    }
    tile.column_sum<!FIRST>(dr, sums[t][DR]);
    c = tile.sum_of_rows(c);
    if (threadIdx.x % 32 == 0) shared.c[warp][t] = FIRST ? c : shared.c[warp][t] + c;
    advance_state(tile, token, v, state);
  }
#pragma unroll
  for (int t = STEP - 1; t >= 0; --t) {
    const float (&token)[VECTORS][N] = shared.tokens[t];
    float r[LANE_COLUMNS], row[LANE_COLUMNS], dv[ROWS];
    tile.read(token[R], r);
    tile.read(token[UK], row);
    const float bonus = lane_dot(row, r);
    tile.read(token[K], row);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
      dv[i] = tile.row_sum(fmaf(token[DY][first_row + i], bonus, lane_dot(g[i], row)));
    if (tile.column_lane == 0 && first + t < end) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
        store_at<Element>(args.dv, ((first + t) * args.H + head) * N + first_row + i, dv[i]);
    }
    float dw[LANE_COLUMNS] = {}, dk[LANE_COLUMNS] = {};
    float keep[LANE_COLUMNS], change[LANE_COLUMNS];
    tile.read(token[KEEP], keep);
    tile.read(token[CHANGE], change);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const float v = token[V][first_row + i], dy = token[DY][first_row + i];
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) {
        const float after = g[i][j];
        dw[j] = fmaf(after, history[t][i][j], dw[j]);
        dk[j] = fmaf(after, v, dk[j]);
        g[i][j] = fmaf(after, keep[j], fmaf(after, change[j], dy * r[j]));
      }
    }
    tile.column_sum<!FIRST>(dw, sums[t][DW]);
    tile.column_sum<!FIRST>(dk, sums[t][DK]);
  }
}

}  // namespace

//% include "cuda_backward.h"
//% include "wkv6_sums.h"

namespace {

// A head's parts of what is summed over all sequences. A channel's thread is the same everywhere.
template <typename Args>
__device__ __forceinline__ void store_parts(const Args& args, int64_t head_index,
                                            const Shared& shared) {
  for (int j = threadIdx.x; j < N; j += THREADS) {
    const int64_t to = head_index * N + j;
    static_cast<float*>(args.du_parts)[to] = shared.du[j];
    if constexpr (!DECAY_PER_TOKEN) {
      const float w = load_mixed<Element>(args.w, args.w_dtype, head_index % args.H * N + j);
      static_cast<float*>(args.dw_parts)[to] = shared.dw[j] * decay_of<DECAY>(w).slope;
    }
  }
}

__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const Arguments args) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  for (int j = threadIdx.x; j < N; j += THREADS)
    shared.du[j] = shared.du_rest[j] = shared.dw[j] = shared.dw_rest[j] = 0.0f;
  walk_back(args, blockIdx.x, shared);
  store_parts(args, blockIdx.x, shared);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const cudaError_t error = launch_heads(*args, backward_kernel);
  return error == cudaSuccess ? launch_sums(*args) : error;
}
