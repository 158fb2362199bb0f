#pragma once
// Rows of the state for a few tokens: how a warp's lanes share them, and what a token does to them.
#include "rwkv_jit/cuda/decay.cuh"
#include "rwkv_jit/cuda/element.cuh"

namespace rwkv_jit {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int LANE_COLUMNS = 8;

// COLUMN_LANES lanes side by side hold a row of S [value, key], each eight keys of it in groups of
// GROUP; lanes one above the other hold other rows.
template <int N, int GROUP>
struct RowLanes {
  static constexpr int COLUMN_LANES = N / LANE_COLUMNS;
  static constexpr int ROW_LANES = 32 / COLUMN_LANES;
  static constexpr int KEYS = GROUP;  // of a lane, side by side
  static_assert(COLUMN_LANES * ROW_LANES == 32, "N is a power of two from 16 to 256");

  int column_lane, row_lane;

  __device__ __forceinline__ RowLanes()
      : column_lane(threadIdx.x % COLUMN_LANES), row_lane(threadIdx.x % 32 / COLUMN_LANES) {}

  // The key that this lane holds in place `at` of 0..7, and how far that is from its first.
  __device__ __forceinline__ int column(int at) const { return column_lane * GROUP + past(at); }
  static __device__ __forceinline__ constexpr int past(int at) {
    return at / GROUP * (COLUMN_LANES * GROUP) + at % GROUP;
  }

  // This lane's eight values of a row of N floats, or COUNT of them from place `first` on; 16-byte
  // reads, where GROUP is 4 free of bank conflicts.
  template <int COUNT>
  __device__ __forceinline__ void read(const float* row, float (&values)[COUNT],
                                       int first = 0) const {
#pragma unroll
    for (int at = 0; at < COUNT; at += 4) {
      const float4 four = *reinterpret_cast<const float4*>(row + column(first + at));
      values[at] = four.x, values[at + 1] = four.y;
      values[at + 2] = four.z, values[at + 3] = four.w;
    }
  }

  // The sum over a row's lanes, in every one of them.
  __device__ __forceinline__ float row_sum(float value) const {
#pragma unroll
    for (int step = COLUMN_LANES / 2; step > 0; step /= 2)
      value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
  }
};

// A decay factor as keep + change with keep 0 or 1: the state is advanced as
// keep * S + (change * S + ...), which loses no digits of factors near 1 from one call to the next.
struct Kept {
  float keep, change;
};
__device__ __forceinline__ Kept kept(const Decay& decay) {
  if (decay.d < 0.5f) return {0.0f, decay.d};
  return {1.0f, (decay.d - 1.0f) + decay.rest};
}

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

// A lane's part of its rows, as it is stored, so that several tokens of one call give the same bits
// as one each of several calls.
template <typename Element, int ROWS>
struct LaneRows {
  Pair<Element> pairs[ROWS][LANE_COLUMNS / 2];

  // S x, one value a row, in every lane of the row.
  template <typename Lanes>
  __device__ __forceinline__ void times(const Lanes& tile, const float (&x)[LANE_COLUMNS],
                                        float (&product)[ROWS]) const {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      float row[LANE_COLUMNS];
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; j += 2) {
        const float2 two = load_pair<Element>(pairs[i][j / 2]);
        row[j] = two.x, row[j + 1] = two.y;
      }
      product[i] = tile.row_sum(lane_dot(row, x));
    }
  }

  // work(s, i, j) advances the value s of row i in column j, COUNT columns from `first` on.
  template <int COUNT, typename Work>
  __device__ __forceinline__ void advance(int first, const Work& work) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < COUNT; j += 2) {
        Pair<Element>& pair = pairs[i][(first + j) / 2];
        const float2 two = load_pair<Element>(pair);
        store_pair<Element>(pair, {work(two.x, i, j), work(two.y, i, j + 1)});
      }
  }
};

}  // namespace rwkv_jit
