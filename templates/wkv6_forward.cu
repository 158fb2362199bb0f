// wkv6 and wkv5 forward, token by token, in float.
//   y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d_t) + v_t k_t^T
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/decay.cuh"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/recurrence.cuh"
//% include "cuda_types.h"
//% include "cuda_tiles.h"
//% include "wkv6_decay.h"

namespace {

using namespace rwkv_jit;

constexpr int STAGE = {{stage_tokens}};

enum Vector { R, K, V, UK, D, VECTORS };  // UK is u * k

// Neighbouring values of each vector of a token.
__device__ __forceinline__ void load_token(const Arguments& args, int64_t t, int64_t head, int j,
                                           float (&carry)[WIDTH<STAGE>],
                                           float (&token)[VECTORS][WIDTH<STAGE>]) {
  const int64_t row = t * args.H + head, from = row * N + j;
  load_at<Element>(args.r, from, token[R]);
  load_at<Element>(args.k, from, token[K]);
  load_at<Element>(args.v, from, token[V]);
  load_mixed<Element>(args.u, args.u_dtype, head * N + j, token[UK]);
  load_mixed<Element>(args.w, args.w_dtype, decay_row(row, head) * N + j, token[D]);
#pragma unroll
  for (int i = 0; i < WIDTH<STAGE>; ++i) {
    token[UK][i] *= token[K][i];
    token[D][i] = carry_rest(decay_of<DECAY>(token[D][i]), carry[i]);
  }
}

// y's sums are those of Tile::sum_rows.
__device__ __forceinline__ void run_token(const Tile& tile, const float (&token)[VECTORS][N],
                                          int first_row, float (&state)[ROWS][LANE_COLUMNS],
                                          float (&y)[ROWS]) {
  float v[ROWS], r[LANE_COLUMNS], uk[LANE_COLUMNS];
  tile.read(token[R], r);
  tile.read(token[UK], uk);
  tile.read_rows(token[V] + first_row, v);
  lane_times(state, r, y);
  const float bonus = lane_dot(uk, r);
#pragma unroll
  for (int i = 0; i < ROWS; ++i) y[i] = fmaf(v[i], bonus, y[i]);
  tile.sum_rows(y);
  advance(tile, state, v, token[D], token[K]);
}

}  // namespace

//% include "cuda_forward.h"
