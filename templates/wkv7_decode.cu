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

// Columns that the state is advanced by together: fewer need fewer registers.
constexpr int AT_ONCE = 4;
// Of a kk that is taken for zero: 1e-12, squared.
constexpr float LEAST_SQUARE = 1e-24f;

// Whether what surrounds the recurrence in a model is done here, too:
//   kk = normalize(k_k * k), gate = sigmoid(a0 + a), w <- w0 + w,
//   k <- k (1 + (gate - 1) k_a), a <- -kk, b <- kk gate.
constexpr bool FUSED = {{fused}};

// One value of each vector of a token. Of kk the length is not known yet. is_first: of the blocks
// of the head, so that it writes what is one for all.
template <typename Args>
__device__ __forceinline__ void load_token(const Args& args, int64_t t, int64_t head, int j,
                                           bool is_first, float (&token)[VECTORS][N]) {
  const int64_t from = (t * args.H + head) * N + j;
  float w = load_mixed<Element>(args.w, args.w_dtype, from);
  float k = load_at<Element>(args.k, from), a = load_at<Element>(args.a, from), b;
  if constexpr (FUSED) {
    const int64_t channel = head * N + j;
    w += load_mixed<Element>(args.w0, args.w0_dtype, channel);
    const float gate = sigmoid(load_mixed<Element>(args.a0, args.a0_dtype, channel) + a);
    a = load_mixed<Element>(args.k_k, args.k_k_dtype, channel) * k;
    b = a * gate;
    k = fmaf(k * (gate - 1.0f), load_mixed<Element>(args.k_a, args.k_a_dtype, channel), k);
    if (is_first) store_at<Element>(args.new_k, from, k);
  } else {
    b = load_at<Element>(args.b, from);
  }
  const Kept decay = kept(decay_of<DECAY>(w));
  token[R][j] = load_at<Element>(args.r, from);
  token[K][j] = k;
  token[V][j] = load_at<Element>(args.v, from);
  token[A][j] = a;
  token[B][j] = b;
  token[KEEP][j] = decay.keep;
  token[CHANGE][j] = decay.change;
}

// The results of a row that is skipped.
template <typename Args>
__device__ __forceinline__ void skip_value(const Args& args, int64_t at) {
  store_at<Element>(args.y, at, 0.0f);
  if constexpr (FUSED) store_at<Element>(args.new_k, at, 0.0f);
}

template <typename Lanes, int ROWS>
__device__ __forceinline__ void run_token(const Lanes& tile, const float (&token)[VECTORS][N],
                                          int first_row, LaneRows<StateElement, ROWS>& state,
                                          float (&y)[ROWS]) {
  float v[ROWS], sa[ROWS], a[LANE_COLUMNS];
  tile.read(token[A], a);
  state.times(tile, a, sa);
  // kk is on both sides of the product, so that its length squared is what both are divided by.
  const float scale = FUSED ? -1.0f / fmaxf(tile.row_sum(lane_dot(a, a)), LEAST_SQUARE) : 1.0f;
#pragma unroll
  for (int i = 0; i < ROWS; ++i) {
    v[i] = token[V][first_row + i];
    if (FUSED) sa[i] *= scale;
    y[i] = 0.0f;
  }
#pragma unroll
  for (int first = 0; first < LANE_COLUMNS; first += AT_ONCE) {
    float keep[AT_ONCE], change[AT_ONCE], b[AT_ONCE], k[AT_ONCE], r[AT_ONCE];
    tile.read(token[R], r, first);
    tile.read(token[KEEP], keep, first);
    tile.read(token[CHANGE], change, first);
    tile.read(token[B], b, first);
    tile.read(token[K], k, first);
    state.template advance<AT_ONCE>(first, [&](float s, int i, int j) {
      s = fmaf(s, keep[j], fmaf(s, change[j], fmaf(sa[i], b[j], v[i] * k[j])));
      y[i] = fmaf(s, r[j], y[i]);
      return s;
    });
  }
#pragma unroll
  for (int i = 0; i < ROWS; ++i) y[i] = tile.row_sum(y[i]);
}

}  // namespace

//% include "cuda_decode.h"
