// wkv6 and wkv5 decode, token by token, in float.
//   y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d_t) + v_t k_t^T
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/row_lanes.cuh"
//% include "cuda_types.h"
//% include "wkv6_decay.h"

namespace {

using namespace rwkv_jit;

enum Vector { R, K, V, UK, KEEP, CHANGE, VECTORS };  // UK is u * k

// Columns that the state is advanced by together: fewer need fewer registers.
constexpr int AT_ONCE = 4;

// One value of each vector of a token.
__device__ __forceinline__ void load_token(const Arguments& args, int64_t t, int64_t head, int j,
                                           bool, float (&token)[VECTORS][N]) {
  const int64_t row = t * args.H + head, from = row * N + j;
  const Kept decay = kept(
      decay_of<DECAY>(load_mixed<Element>(args.w, args.w_dtype, decay_row(row, head) * N + j)));
  const float k = load_at<Element>(args.k, from);
  token[R][j] = load_at<Element>(args.r, from);
  token[K][j] = k;
  token[V][j] = load_at<Element>(args.v, from);
  token[UK][j] = load_mixed<Element>(args.u, args.u_dtype, head * N + j) * k;
  token[KEEP][j] = decay.keep;
  token[CHANGE][j] = decay.change;
}

// The results of a row that is skipped.
__device__ __forceinline__ void skip_value(const Arguments& args, int64_t at) {
  store_at<Element>(args.y, at, 0.0f);
}

template <typename Lanes, int ROWS>
__device__ __forceinline__ void run_token(const Lanes& tile, const float (&token)[VECTORS][N],
                                          int first_row, LaneRows<StateElement, ROWS>& state,
                                          float (&y)[ROWS]) {
  float v[ROWS], r[LANE_COLUMNS], uk[LANE_COLUMNS];
  tile.read(token[R], r);
  tile.read(token[UK], uk);
  const float bonus = tile.row_sum(lane_dot(uk, r));
  state.times(tile, r, y);
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    v[i] = token[V][first_row + i];
    y[i] = fmaf(v[i], bonus, y[i]);
  }
#pragma unroll
  for (int first = 0; first < LANE_COLUMNS; first += AT_ONCE) {
    float keep[AT_ONCE], change[AT_ONCE], k[AT_ONCE];
    tile.read(token[KEEP], keep, first);
    tile.read(token[CHANGE], change, first);
    tile.read(token[K], k, first);
    state.template advance<AT_ONCE>(first, [&](float s, int i, int j) {
      return fmaf(s, keep[j], fmaf(s, change[j], v[i] * k[j]));
    });
  }
}

}  // namespace

//% include "cuda_decode.h"
