#pragma once
// How a warp's lanes share rows of the state S [value, key]: COLUMN_LANES lanes side by side hold a
// row, each eight keys of it in groups of GROUP; lanes one above the other hold other rows.
#include <cstdint>

namespace rwkv_jit {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int LANE_COLUMNS = 8;

template <int N, int GROUP = 4>
struct Tile {
  static constexpr int COLUMN_LANES = N / LANE_COLUMNS;
  static constexpr int ROW_LANES = 32 / COLUMN_LANES;
  static constexpr int KEYS = GROUP;  // of a lane, side by side
  static_assert(COLUMN_LANES * ROW_LANES == 32, "N is a power of two from 16 to 256");

  int column_lane, row_lane;

  __device__ __forceinline__ Tile()
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
  __device__ __forceinline__ void write(const float (&values)[LANE_COLUMNS], float* row) const {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float4*>(row + column(half * 4)) = make_float4(
          values[half * 4], values[half * 4 + 1], values[half * 4 + 2], values[half * 4 + 3]);
  }

  // The sum over a row's lanes, in every one of them.
  __device__ __forceinline__ float row_sum(float value) const {
#pragma unroll
    for (int step = COLUMN_LANES / 2; step > 0; step /= 2)
      value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
  }

  // The sum over a warp's rows of what all lanes of a row hold alike.
  __device__ __forceinline__ float sum_of_rows(float value) const {
#pragma unroll
    for (int step = ROW_LANES / 2; step > 0; step /= 2)
      value += __shfl_xor_sync(ALL_LANES, value, step * COLUMN_LANES);
    return value;
  }

  // Sums each column over the warp's rows and writes (or, with ADD, adds) the sums to a row of N
  // floats. Each halving leaves a lane with half as many columns; every column has one writer.
  template <bool ADD>
  __device__ __forceinline__ void column_sum(float (&values)[LANE_COLUMNS], float* row) const {
    int width = LANE_COLUMNS, first = 0;
    bool writer = true;
#pragma unroll
    for (int step = ROW_LANES / 2; step > 0; step /= 2) {
      const bool upper = (row_lane & step) != 0;
      if (width > 1) {
        width /= 2;
#pragma unroll
        for (int at = 0; at < LANE_COLUMNS / 2; ++at) {
          if (at >= width) break;
          const float give = upper ? values[at] : values[at + width];
          const float hold = upper ? values[at + width] : values[at];
          values[at] = hold + __shfl_xor_sync(ALL_LANES, give, step * COLUMN_LANES);
        }
        first += upper ? width : 0;
      } else {
        values[0] += __shfl_xor_sync(ALL_LANES, values[0], step * COLUMN_LANES);
        writer = writer && !upper;
      }
    }
#pragma unroll
    for (int at = 0; at < LANE_COLUMNS; ++at) {
      if (at >= width || !writer) break;
      float& to = row[column(first + at)];
      to = ADD ? to + values[at] : values[at];
    }
  }
};

}  // namespace rwkv_jit
