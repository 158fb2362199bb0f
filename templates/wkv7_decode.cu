// wkv7 decode, token by token, in float.
//   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/row_lanes.cuh"
//% include "cuda_types.h"
namespace {

using namespace rwkv_jit;

enum Vector { R, K, V, A, B, KEEP, CHANGE, VECTORS };

// One value of each vector of a token.
__device__ __forceinline__ void load_token(const Arguments& args, int64_t t, int64_t head, int j,
                                           float (&token)[VECTORS][N]) {
  const int64_t from = (t * args.H + head) * N + j;
  const Kept decay = kept(decay_of<DECAY>(load_mixed<Element>(args.w, args.w_dtype, from)));
  token[R][j] = load_at<Element>(args.r, from);
  token[K][j] = load_at<Element>(args.k, from);
  token[V][j] = load_at<Element>(args.v, from);
  token[A][j] = load_at<Element>(args.a, from);
  token[B][j] = load_at<Element>(args.b, from);
  token[KEEP][j] = decay.keep;
  token[CHANGE][j] = decay.change;
}

// AT_ONCE: columns that the state is advanced by together.
template <int AT_ONCE = LANE_COLUMNS, typename Lanes, int ROWS>
__device__ __forceinline__ void run_token(const Lanes& tile, const float (&token)[VECTORS][N],
                                          int first_row, float (&state)[ROWS][LANE_COLUMNS],
                                          float (&y)[ROWS]) {
  float v[ROWS], sa[ROWS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i) v[i] = token[V][first_row + i];
  state_times(tile, state, token[A], sa);
  advance<AT_ONCE>(tile, state, sa, v, token[KEEP], token[CHANGE], token[B], token[K]);
  state_times(tile, state, token[R], y);
}

}  // namespace

//% include "cuda_decode.h"
