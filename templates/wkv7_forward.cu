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

enum Vector { R, K, V, A, B, KEEP, CHANGE, VECTORS };

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
  token[KEEP][j] = decay.keep;
  token[CHANGE][j] = decay.change;
}

__device__ __forceinline__ void run_token(const Tile<N>& tile, const float (&token)[VECTORS][N],
                                          int first_row, float (&state)[ROWS][LANE_COLUMNS],
                                          float (&y)[ROWS]) {
  float v[ROWS], sa[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) v[i] = token[V][first_row + i];
  state_times(tile, state, token[A], sa);
  advance(tile, state, sa, v, token[KEEP], token[CHANGE], token[B], token[K]);
  state_times(tile, state, token[R], y);
}

}  // namespace

//% include "cuda_forward.h"
