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

// S <- S diag(d) + sa b^T + v k^T. AT_ONCE columns at a time: fewer need fewer registers.
template <int AT_ONCE = LANE_COLUMNS, typename Lanes, int ROWS>
__device__ __forceinline__ void advance(const Lanes& tile, float (&state)[ROWS][LANE_COLUMNS],
                                        const float (&sa)[ROWS], const float (&v)[ROWS],
                                        const float* keep_row, const float* change_row,
                                        const float* b_row, const float* k_row) {
#pragma unroll
  for (int first = 0; first < LANE_COLUMNS; first += AT_ONCE) {
    float keep[AT_ONCE], change[AT_ONCE], b[AT_ONCE], k[AT_ONCE];
    tile.read(keep_row, keep, first);
    tile.read(change_row, change, first);
    tile.read(b_row, b, first);
    tile.read(k_row, k, first);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const float s = state[i][first + j];
        state[i][first + j] = fmaf(s, keep[j], fmaf(s, change[j], fmaf(sa[i], b[j], v[i] * k[j])));
      }
  }
}

// S <- S diag(d) + v k^T.
template <int AT_ONCE = LANE_COLUMNS, typename Lanes, int ROWS>
__device__ __forceinline__ void advance(const Lanes& tile, float (&state)[ROWS][LANE_COLUMNS],
                                        const float (&v)[ROWS], const float* keep_row,
                                        const float* change_row, const float* k_row) {
#pragma unroll
  for (int first = 0; first < LANE_COLUMNS; first += AT_ONCE) {
    float keep[AT_ONCE], change[AT_ONCE], k[AT_ONCE];
    tile.read(keep_row, keep, first);
    tile.read(change_row, change, first);
    tile.read(k_row, k, first);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < AT_ONCE; ++j) {
        const float s = state[i][first + j];
        state[i][first + j] = fmaf(s, keep[j], fmaf(s, change[j], v[i] * k[j]));
      }
  }
}

}  // namespace rwkv_jit
