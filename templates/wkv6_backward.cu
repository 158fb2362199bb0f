// wkv6 and wkv5 backward, token by token, in float.
//   G_t = dL/dS_t,   c_t = dy_t . v_t,   G_{t-1} = G_t diag(d_t) + dy_t r_t^T
//   dr = S_{t-1}^T dy + c u * k   dk = G^T v + c u * r   dv = G k + ((u * k) . r) dy
//   du = sum over tokens of c r * k   dd = sum over rows of G_t S_{t-1}, element by element
// Sums over tokens: by the threads of a channel, and over sequences, in their order, by a second
// kernel.
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

// UK is u * k, and dv takes the place of dy. The first ones are what advance_state takes.
enum Vector { K, V, D, AHEAD_VECTORS, R = AHEAD_VECTORS, UK, DY, SLOPE, VECTORS, DV = DY };
enum Gradient { DR, DW, DK, GRADIENTS };  // those that are sums over rows

constexpr int PARTS = THREADS * WIDTH<STEP> / N;  // threads that read a channel

// A sum over tokens: each thread's part, and what rounding takes from it.
struct Total {
  float sum[PARTS][N], rest[PARTS][N];
};

struct Shared {
  float tokens[STEP][VECTORS][N];
  float sums[WARPS][STEP][GRADIENTS][N];  // each warp's part
  float state[BLOCK_ROWS][N];             // before a step, or in its middle
  float c[STEP][WARPS];                   // each warp's part of c
  Total du, dw;                           // dw where the decay is one for all
};

__device__ __forceinline__ void add_to(Total& total, const float (&terms)[WIDTH<STEP>]) {
  const int at = threadIdx.x * WIDTH<STEP>;
  float sum[WIDTH<STEP>], rest[WIDTH<STEP>];
  load_at<float>(total.sum, at, sum);
  load_at<float>(total.rest, at, rest);
#pragma unroll
  for (int i = 0; i < WIDTH<STEP>; ++i) add_long(terms[i], sum[i], rest[i]);
  store_at<float>(total.sum, at, sum);
  store_at<float>(total.rest, at, rest);
}

// Neighbouring values of each vector of a token; AHEAD: of what advance_state takes.
template <bool AHEAD>
__device__ __forceinline__ void load_token(const Arguments& args, int64_t row, int64_t head, int j,
                                           float (&carry)[WIDTH<STEP>],
                                           float (&token)[VECTORS][WIDTH<STEP>]) {
  const int64_t from = row * N + j;
  load_at<Element>(args.k, from, token[K]);
  load_at<Element>(args.v, from, token[V]);
  load_mixed<Element>(args.w, args.w_dtype, decay_row(row, head) * N + j, token[D]);
  if constexpr (!AHEAD) {
    load_at<Element>(args.r, from, token[R]);
    load_mixed<Element>(args.u, args.u_dtype, head * N + j, token[UK]);
    load_at<Element>(args.dy, from, token[DY]);
  }
#pragma unroll
  for (int i = 0; i < WIDTH<STEP>; ++i) {
    const Decay decay = decay_of<DECAY>(token[D][i]);
    token[D][i] = carry_rest(decay, carry[i]);
    token[UK][i] *= token[K][i];
    token[SLOPE][i] = decay.slope;
  }
}

// The state is advanced by the token's vectors alone.
__device__ __forceinline__ void load_products(const Arguments&, int64_t, int,
                                              float (&)[VECTORS][WIDTH<STEP>]) {}
__device__ __forceinline__ void find_products(const Arguments&, const Tile&, int64_t, int,
                                              const float (&)[ROWS][LANE_COLUMNS],
                                              float (&)[VECTORS][N]) {}

__device__ __forceinline__ void advance_state(const Tile& tile, const float (&token)[VECTORS][N],
                                              int first_row, float (&state)[ROWS][LANE_COLUMNS]) {
  float v[ROWS];
  tile.read_rows(token[V] + first_row, v);
  advance(tile, state, v, token[D], token[K]);
}

// Takes g = G_t to G_{t-1}, with the state before the token. The gradients that are sums over rows
// are added up over rows of this warp, and over those that had their turn before with `add`.
__device__ __forceinline__ void take_back(const Tile& tile, int first_row, int t, bool add,
                                          const float (&state)[ROWS][LANE_COLUMNS],
                                          float (&g)[ROWS][LANE_COLUMNS], Shared& shared) {
  const int warp = threadIdx.x / 32;
  float (&token)[VECTORS][N] = shared.tokens[t];
  float (&sums)[GRADIENTS][N] = shared.sums[warp][t];
  float r[LANE_COLUMNS], x[LANE_COLUMNS], sum[LANE_COLUMNS], v[ROWS], dy[ROWS], dv[ROWS];

  tile.read(token[R], r);
  tile.read(token[UK], x);
  const float bonus = lane_dot(x, r);
  tile.read_rows(token[V] + first_row, v);
  tile.read_rows(token[DY] + first_row, dy);
  tile.read(token[K], x);
  lane_times(g, x, dv);
  float c = 0;
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    dv[i] = fmaf(dy[i], bonus, dv[i]);
    c = fmaf(v[i], dy[i], c);
  }
  tile.sum_rows(dv);
  __syncwarp();  // dy has been read
  if (tile.has_rows()) {
#pragma unroll
    for (int i = 0; i < Tile::PAIR; ++i) token[DV][first_row + tile.row(i)] = dv[i];
  }
  c = tile.sum_of_rows(c);
  if (threadIdx.x % 32 == 0) shared.c[t][warp] = add ? shared.c[t][warp] + c : c;

  times_lane(v, g, sum);
  tile.sum_columns(sum, sums[DK], add);
  times_lane(dy, state, sum);
  tile.sum_columns(sum, sums[DR], add);
  sum_products(g, state, sum);
  tile.sum_columns(sum, sums[DW], add);

  tile.read(token[D], x);
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; ++j) g[i][j] = fmaf(g[i][j], x[j], dy[i] * r[j]);
}

// Adds up the warps' parts, writes the gradients of a step's tokens and adds to the sums over
// tokens.
__device__ __forceinline__ void store_gradients(const Arguments& args, const Chunk& chunk, int step,
                                                Shared& shared) {
  for_my_channels<STEP>([&](int, int t, int j) {
    if (step * STEP + t >= chunk.count) return;
    const float (&token)[VECTORS][N] = shared.tokens[t];
    const int64_t to = (chunk.first + (step * STEP + t) * args.H) * N + j;
    float c = 0, sum[WIDTH<STEP>], x[WIDTH<STEP>], u[WIDTH<STEP>];
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) c += shared.c[t][warp];
    sum_warps(shared.sums, t, DR, j, sum);
    load_at<float>(token[UK], j, x);
#pragma unroll
    for (int i = 0; i < WIDTH<STEP>; ++i) sum[i] = fmaf(c, x[i], sum[i]);
    store_at<Element>(args.dr, to, sum);
    sum_warps(shared.sums, t, DK, j, sum);
    load_at<float>(token[R], j, x);
    load_mixed<Element>(args.u, args.u_dtype, chunk.head * N + j, u);
#pragma unroll
    for (int i = 0; i < WIDTH<STEP>; ++i) sum[i] = fmaf(c, u[i] * x[i], sum[i]);
    store_at<Element>(args.dk, to, sum);
    load_at<float>(token[K], j, u);
#pragma unroll
    for (int i = 0; i < WIDTH<STEP>; ++i) u[i] *= c * x[i];
    add_to(shared.du, u);
    load_at<float>(token[DV], j, x);
    store_at<Element>(args.dv, to, x);
    sum_warps(shared.sums, t, DW, j, sum);
    load_at<float>(token[SLOPE], j, x);
#pragma unroll
    for (int i = 0; i < WIDTH<STEP>; ++i) sum[i] *= x[i];
    if constexpr (DECAY_PER_TOKEN) {
      store_mixed<Element>(args.dw, args.dw_dtype, to, sum);
    } else {
      add_to(shared.dw, sum);
    }
  });
}

}  // namespace

//% include "cuda_backward.h"
//% include "wkv6_sums.h"

namespace {

// A head's part of what is summed over all sequences.
__device__ __forceinline__ void store_total(const Total& total, void* parts, int64_t head_index) {
  for (int j = threadIdx.x; j < N; j += THREADS) {
    float sum = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) sum += total.sum[part][j];
    static_cast<float*>(parts)[head_index * N + j] = sum;
  }
}

template <typename Args>
__device__ __forceinline__ void store_totals(const Args& args, const Shared& shared) {
  __syncthreads();  // every thread's part is there
  store_total(shared.du, args.du_parts, blockIdx.x);
  if constexpr (!DECAY_PER_TOKEN) store_total(shared.dw, args.dw_parts, blockIdx.x);
}

__global__ void __launch_bounds__(THREADS, BLOCKS) backward_kernel(const Arguments args) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  for (int at = threadIdx.x; at < PARTS * N; at += THREADS)
    (&shared.du.sum[0][0])[at] = (&shared.du.rest[0][0])[at] = (&shared.dw.sum[0][0])[at] =
        (&shared.dw.rest[0][0])[at] = 0.0f;
  walk_back(args, shared);
  store_totals(args, shared);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const cudaError_t error = launch_heads(*args, backward_kernel);
  return error == cudaSuccess ? launch_sums(*args) : error;
}
