// wkv7 forward, token by token, in float.
//   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/decay.cuh"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/recurrence.cuh"
//% include "cuda_types.h"
//% include "cuda_tiles.h"

namespace {

using namespace rwkv_jit;

constexpr int STAGE = {{stage_tokens}};

enum Vector { R, K, V, A, B, D, VECTORS };

// Neighbouring values of each vector of a token.
__device__ __forceinline__ void load_token(const Arguments& args, int64_t t, int64_t head, int j,
                                           float (&carry)[WIDTH<STAGE>],
                                           float (&token)[VECTORS][WIDTH<STAGE>]) {
  const int64_t from = (t * args.H + head) * N + j;
  load_at<Element>(args.r, from, token[R]);
  load_at<Element>(args.k, from, token[K]);
  load_at<Element>(args.v, from, token[V]);
  load_at<Element>(args.a, from, token[A]);
  load_at<Element>(args.b, from, token[B]);
  load_mixed<Element>(args.w, args.w_dtype, from, token[D]);
#pragma unroll
  for (int i = 0; i < WIDTH<STAGE>; ++i)
    token[D][i] = carry_rest(decay_of<DECAY>(token[D][i]), carry[i]);
}

// y's sums are those of Tile::sum_rows.
__device__ __forceinline__ void run_token(const Tile& tile, const float (&token)[VECTORS][N],
                                          int first_row, float (&state)[ROWS][LANE_COLUMNS],
                                          float (&y)[ROWS]) {
  float x[LANE_COLUMNS], v[ROWS], sa[ROWS];
  tile.read(token[A], x);
  lane_times(state, x, sa);
  tile.sum_rows(sa);
  tile.share_rows(sa);
  tile.read_rows(token[V] + first_row, v);
  advance(tile, state, sa, v, token[D], token[B], token[K]);
  tile.read(token[R], x);
  lane_times(state, x, y);
  tile.sum_rows(y);
}

}  // namespace

//% include "cuda_forward.h"
