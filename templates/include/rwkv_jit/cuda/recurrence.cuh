#pragma once
// One token for the rows that a lane holds.
#include "rwkv_jit/cuda/tile.cuh"

namespace rwkv_jit {

// A lane's part of the product of two rows.
__device__ __forceinline__ float lane_dot(const float (&left)[LANE_COLUMNS],
                                          const float (&right)[LANE_COLUMNS]) {
  float even = 0, odd = 0;
#pragma unroll
  for (int j = 0; j < LANE_COLUMNS; j += 2) {
    even = fmaf(left[j], right[j], even);
    odd = fmaf(left[j + 1], right[j + 1], odd);
  }
  return even + odd;
}

// S a, one value a row, in every lane of the row.
template <typename Lanes, int ROWS>
__device__ __forceinline__ void state_times(const Lanes& tile,
                                            const float (&state)[ROWS][LANE_COLUMNS],
                                            const float* vector, float (&product)[ROWS]) {
  float x[LANE_COLUMNS];
  tile.read(vector, x);
#pragma unroll
  for (int i = 0; i < ROWS; ++i) product[i] = tile.row_sum(lane_dot(state[i], x));
}

// S <- S diag(d) + sa b^T + v k^T. Half of the columns at a time, whose vectors need fewer registers.
template <typename Lanes, int ROWS>
__device__ __forceinline__ void advance(const Lanes& tile, float (&state)[ROWS][LANE_COLUMNS],
                                        const float (&sa)[ROWS], const float (&v)[ROWS],
                                        const float* keep_row, const float* change_row,
                                        const float* b_row, const float* k_row) {
#pragma unroll
  for (int half = 0; half < LANE_COLUMNS; half += 4) {
    const int from = tile.column(half);
    float keep[4], change[4], b[4], k[4];
    read_four(keep_row + from, keep);
    read_four(change_row + from, change);
    read_four(b_row + from, b);
    read_four(k_row + from, k);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float s = state[i][half + j];
        state[i][half + j] = fmaf(s, keep[j], fmaf(s, change[j], fmaf(sa[i], b[j], v[i] * k[j])));
      }
  }
}

// S <- S diag(d) + v k^T.
template <typename Lanes, int ROWS>
__device__ __forceinline__ void advance(const Lanes& tile, float (&state)[ROWS][LANE_COLUMNS],
                                        const float (&v)[ROWS], const float* keep_row,
                                        const float* change_row, const float* k_row) {
#pragma unroll
  for (int half = 0; half < LANE_COLUMNS; half += 4) {
    const int from = tile.column(half);
    float keep[4], change[4], k[4];
    read_four(keep_row + from, keep);
    read_four(change_row + from, change);
    read_four(k_row + from, k);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float s = state[i][half + j];
        state[i][half + j] = fmaf(s, keep[j], fmaf(s, change[j], v[i] * k[j]));
      }
  }
}

}  // namespace rwkv_jit
