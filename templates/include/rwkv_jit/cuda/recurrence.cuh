#pragma once
// One token for the rows that a lane holds.
#include "rwkv_jit/cuda/tile.cuh"

namespace rwkv_jit {

// A lane's part of the product of two rows.
__device__ __forceinline__ float lane_dot(const float (&left)[LANE_COLUMNS],
                                          const float (&right)[LANE_COLUMNS]) {
  float sum = left[0] * right[0];
#pragma unroll
  for (int j = 1; j < LANE_COLUMNS; ++j) sum = fmaf(left[j], right[j], sum);
  return sum;
}

// A lane's part of S x, one value a row.
template <int ROWS>
__device__ __forceinline__ void lane_times(const float (&state)[ROWS][LANE_COLUMNS],
                                           const float (&x)[LANE_COLUMNS], float (&product)[ROWS]) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i) product[i] = lane_dot(state[i], x);
}

// A lane's part of x S, one value a column.
template <int ROWS>
__device__ __forceinline__ void times_lane(const float (&x)[ROWS],
                                           const float (&state)[ROWS][LANE_COLUMNS],
                                           float (&product)[LANE_COLUMNS]) {
#pragma unroll
  for (int j = 0; j < LANE_COLUMNS; ++j) {
    product[j] = x[0] * state[0][j];
#pragma unroll
    for (int i = 1; i < ROWS; ++i) product[j] = fmaf(x[i], state[i][j], product[j]);
  }
}

// A lane's part of the sums over rows of G S, element by element.
template <int ROWS>
__device__ __forceinline__ void sum_products(const float (&left)[ROWS][LANE_COLUMNS],
                                             const float (&right)[ROWS][LANE_COLUMNS],
                                             float (&sum)[LANE_COLUMNS]) {
#pragma unroll
  for (int j = 0; j < LANE_COLUMNS; ++j) {
    sum[j] = left[0][j] * right[0][j];
#pragma unroll
    for (int i = 1; i < ROWS; ++i) sum[j] = fmaf(left[i][j], right[i][j], sum[j]);
  }
}

// Adds up the warps' parts of sums over rows, neighbouring columns of one token and gradient.
template <int WARPS, int STEP, int GRADIENTS, int N, int WIDTH>
__device__ __forceinline__ void sum_warps(const float (&sums)[WARPS][STEP][GRADIENTS][N], int t,
                                          int gradient, int j, float (&sum)[WIDTH]) {
  load_at<float>(sums[0][t][gradient], j, sum);
#pragma unroll
  for (int warp = 1; warp < WARPS; ++warp) {
    float part[WIDTH];
    load_at<float>(sums[warp][t][gradient], j, part);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum[i] += part[i];
  }
}

// S <- S diag(d) + sa b^T + v k^T.
template <typename Tile, int ROWS>
__device__ __forceinline__ void advance(const Tile& tile, float (&state)[ROWS][LANE_COLUMNS],
                                        const float (&sa)[ROWS], const float (&v)[ROWS],
                                        const float* d_row, const float* b_row,
                                        const float* k_row) {
  float d[LANE_COLUMNS], b[LANE_COLUMNS], k[LANE_COLUMNS];
  tile.read(d_row, d);
  tile.read(b_row, b);
  tile.read(k_row, k);
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; ++j)
      state[i][j] = fmaf(state[i][j], d[j], fmaf(sa[i], b[j], v[i] * k[j]));
}

// S <- S diag(d) + v k^T.
template <typename Tile, int ROWS>
__device__ __forceinline__ void advance(const Tile& tile, float (&state)[ROWS][LANE_COLUMNS],
                                        const float (&v)[ROWS], const float* d_row,
                                        const float* k_row) {
  float d[LANE_COLUMNS], k[LANE_COLUMNS];
  tile.read(d_row, d);
  tile.read(k_row, k);
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; ++j) state[i][j] = fmaf(state[i][j], d[j], v[i] * k[j]);
}

}  // namespace rwkv_jit
