// wkv7 backward, token by token, in float.
//   G_t = dL/dS_t,   g_t = G_t + dy_t r_t^T,   dsa_t = g_t b_t
//   G_{t-1} = g_t diag(d_t) + dsa_t a_t^T
//   dr = S_t^T dy = d S_{t-1}^T dy + (sa . dy) b + (v . dy) k   dv = g k   dk = g^T v
//   db = g^T sa   da = S_{t-1}^T dsa   dd = sum over rows of g S_{t-1}, element by element
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

// SA is S_{t-1} a, and dv takes the place of dy. The first ones are what advance_state takes.
enum Vector { K, V, A, B, D, AHEAD_VECTORS, R = AHEAD_VECTORS, DY, SLOPE, SA, VECTORS, DV = DY };
enum Gradient { DR, DW, DK, DA, DB, GRADIENTS };  // those that are sums over rows

struct Shared {
  float tokens[STEP][VECTORS][N];
  float sums[WARPS][STEP][GRADIENTS][N];  // each warp's part
  float state[BLOCK_ROWS][N];             // before a step, or in its middle
};

// Neighbouring values of each vector of a token but SA; AHEAD: of what advance_state takes.
template <bool AHEAD>
__device__ __forceinline__ void load_token(const Arguments& args, int64_t row, int64_t head, int j,
                                           float (&carry)[WIDTH<STEP>],
                                           float (&token)[VECTORS][WIDTH<STEP>]) {
  const int64_t from = row * N + j;
  load_at<Element>(args.k, from, token[K]);
  load_at<Element>(args.v, from, token[V]);
  load_at<Element>(args.a, from, token[A]);
  load_at<Element>(args.b, from, token[B]);
  load_mixed<Element>(args.w, args.w_dtype, from, token[D]);
  if constexpr (!AHEAD) {
    load_at<Element>(args.r, from, token[R]);
    load_at<Element>(args.dy, from, token[DY]);
  }
#pragma unroll
  for (int i = 0; i < WIDTH<STEP>; ++i) {
    const Decay decay = decay_of<DECAY>(token[D][i]);
    token[D][i] = carry_rest(decay, carry[i]);
    token[SLOPE][i] = decay.slope;
  }
}

// What find_products found before.
template <typename Args>
__device__ __forceinline__ void load_products(const Args& args, int64_t place, int j,
                                              float (&token)[VECTORS][WIDTH<STEP>]) {
  load_at<float>(args.products, place * N + j, token[SA]);
}

// The products of the state before a token with its vectors, also for load_products.
template <typename Args>
__device__ __forceinline__ void find_products(const Args& args, const Tile& tile, int64_t place,
                                              int first_row,
                                              const float (&state)[ROWS][LANE_COLUMNS],
                                              float (&token)[VECTORS][N]) {
  float a[LANE_COLUMNS], sa[ROWS];
  tile.read(token[A], a);
  lane_times(state, a, sa);
  tile.sum_rows(sa);
  if (tile.has_rows()) {
#pragma unroll
    for (int i = 0; i < Tile::PAIR; ++i) {
      const int row = first_row + tile.row(i);
      token[SA][row] = static_cast<float*>(args.products)[place * N + row] = sa[i];
    }
  }
  __syncwarp();
}

__device__ __forceinline__ void advance_state(const Tile& tile, const float (&token)[VECTORS][N],
                                              int first_row, float (&state)[ROWS][LANE_COLUMNS]) {
  float v[ROWS], sa[ROWS];
  tile.read_rows(token[V] + first_row, v);
  tile.read_rows(token[SA] + first_row, sa);
  advance(tile, state, sa, v, token[D], token[B], token[K]);
}

// Takes g = G_t to G_{t-1}, with the state before the token. The gradients that are sums over rows
// are added up over rows of this warp, and over those that had their turn before with `add`.
__device__ __forceinline__ void take_back(const Tile& tile, int first_row, int t, bool add,
                                          const float (&state)[ROWS][LANE_COLUMNS],
                                          float (&g)[ROWS][LANE_COLUMNS], Shared& shared) {
  float (&token)[VECTORS][N] = shared.tokens[t];
  float (&sums)[GRADIENTS][N] = shared.sums[threadIdx.x / 32][t];
  float x[LANE_COLUMNS], d[LANE_COLUMNS], sum[LANE_COLUMNS], dy[ROWS], v[ROWS], sa[ROWS];

  tile.read(token[R], x);
  tile.read_rows(token[DY] + first_row, dy);
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; ++j) g[i][j] = fmaf(dy[i], x[j], g[i][j]);
  float b[LANE_COLUMNS], dsa[ROWS], dv[ROWS];
  tile.read(token[B], b);
  lane_times(g, b, dsa);
  tile.sum_rows(dsa);
  tile.read(token[K], x);
  lane_times(g, x, dv);
  tile.sum_rows(dv);
  __syncwarp();  // dy has been read
  if (tile.has_rows()) {
#pragma unroll
    for (int i = 0; i < Tile::PAIR; ++i) token[DV][first_row + tile.row(i)] = dv[i];
  }

  tile.read_rows(token[V] + first_row, v);
  tile.read_rows(token[SA] + first_row, sa);
  float sa_dy = 0, v_dy = 0;
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    sa_dy = fmaf(sa[i], dy[i], sa_dy);
    v_dy = fmaf(v[i], dy[i], v_dy);
  }
  sum_products(g, state, sum);
  tile.sum_columns(sum, sums[DW], add);
  tile.read(token[D], d);
  times_lane(dy, state, sum);
#pragma unroll
  for (int j = 0; j < LANE_COLUMNS; ++j)
    sum[j] = fmaf(sum[j], d[j], fmaf(sa_dy, b[j], v_dy * x[j]));
  tile.sum_columns(sum, sums[DR], add);
  times_lane(v, g, sum);
  tile.sum_columns(sum, sums[DK], add);
  times_lane(sa, g, sum);
  tile.sum_columns(sum, sums[DB], add);
  tile.share_rows(dsa);
  times_lane(dsa, state, sum);
  tile.sum_columns(sum, sums[DA], add);

  tile.read(token[A], x);
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; ++j) g[i][j] = fmaf(g[i][j], d[j], dsa[i] * x[j]);
}

// Adds up the warps' parts and writes the gradients of a step's tokens.
__device__ __forceinline__ void store_gradients(const Arguments& args, const Chunk& chunk, int step,
                                                const Shared& shared) {
  for_my_channels<STEP>([&](int, int t, int j) {
    if (step * STEP + t >= chunk.count) return;
    const int64_t to = (chunk.first + (step * STEP + t) * args.H) * N + j;
    float sum[WIDTH<STEP>], slope[WIDTH<STEP>];
    sum_warps(shared.sums, t, DR, j, sum);
    store_at<Element>(args.dr, to, sum);
    sum_warps(shared.sums, t, DK, j, sum);
    store_at<Element>(args.dk, to, sum);
    sum_warps(shared.sums, t, DA, j, sum);
    store_at<Element>(args.da, to, sum);
    sum_warps(shared.sums, t, DB, j, sum);
    store_at<Element>(args.db, to, sum);
    sum_warps(shared.sums, t, DW, j, sum);
    load_at<float>(shared.tokens[t][SLOPE], j, slope);
#pragma unroll
    for (int i = 0; i < WIDTH<STEP>; ++i) sum[i] *= slope[i];
    store_mixed<Element>(args.dw, args.dw_dtype, to, sum);
    load_at<float>(shared.tokens[t][DV], j, sum);
    store_at<Element>(args.dv, to, sum);
  });
}

}  // namespace

//% include "cuda_backward.h"

namespace {

__global__ void __launch_bounds__(THREADS, BLOCKS) backward_kernel(const Arguments args) {
  extern __shared__ __align__(16) char shared_bytes[];
  walk_back(args, *reinterpret_cast<Shared*>(shared_bytes));
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return launch_heads(*args, backward_kernel);
}
