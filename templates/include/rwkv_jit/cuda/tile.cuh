#pragma once
// How a warp's lanes share rows of the state S [value, key]: COLUMN_LANES lanes side by side hold
// the same ROWS rows, each eight keys of them in two groups of four; lanes one above the other hold
// other rows. Lanes side by side hold their rows in different orders: where a sum over them is made
// by halves, what a lane gives away is then always its upper half. (The same for columns has lanes
// read both groups at once, and that costs more than the choice between halves does.)
#include "rwkv_jit/cuda/copy.cuh"
#include "rwkv_jit/cuda/element.cuh"

namespace rwkv_jit {

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int LANE_COLUMNS = 8;

template <int LANE_ROWS, int N>
struct Tile {
  static constexpr int ROWS = LANE_ROWS;
  static constexpr int COLUMN_LANES = N / LANE_COLUMNS;
  static constexpr int ROW_LANES = 32 / COLUMN_LANES;
  static constexpr int WARP_ROWS = ROW_LANES * ROWS;
  static constexpr int PAIR = ROWS > 1 ? 2 : 1;  // rows that every lane holds side by side
  // Of a sum over columns, the lanes that have it and how many values each of them has.
  static constexpr int COLUMN_SUMS = ROW_LANES < LANE_COLUMNS ? LANE_COLUMNS / ROW_LANES : 1;
  static_assert(COLUMN_LANES * ROW_LANES == 32, "N is a power of two from 16 to 256");
  static_assert(ROWS / PAIR <= COLUMN_LANES, "each pair of rows has a lane of its own");

  int column_lane, row_lane, row_order;

  __device__ __forceinline__ Tile()
      : column_lane(threadIdx.x % COLUMN_LANES),
        row_lane(threadIdx.x % 32 / COLUMN_LANES),
        row_order(0) {
#pragma unroll
    for (int width = ROWS / 2, step = 1; width >= PAIR; width /= 2, step *= 2)
      row_order += (column_lane & step) != 0 ? width : 0;
  }

  // The warp's row that this lane holds in place `at`, and the key.
  __device__ __forceinline__ int row(int at) const { return row_lane * ROWS + (at ^ row_order); }
  __device__ __forceinline__ int column(int at) const {
    return at / 4 * (N / 2) + column_lane * 4 + at % 4;
  }

  // This lane's eight values of a row of N floats; 16-byte reads, free of bank conflicts.
  __device__ __forceinline__ void read(const float* row, float (&values)[LANE_COLUMNS]) const {
    read_fours(row + column(0), row + column(4), values);
  }

  // This lane's part of a copy of the warp's rows, which lies as the lanes hold it.
  __device__ __forceinline__ void read_copy(const float* copy,
                                            float (&values)[ROWS][LANE_COLUMNS]) const {
    copy += threadIdx.x % 32 * 4;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) read_fours(copy + i * 256, copy + i * 256 + 128, values[i]);
  }
  __device__ __forceinline__ void write_copy(const float (&values)[ROWS][LANE_COLUMNS],
                                             float* copy) const {
    copy += threadIdx.x % 32 * 4;
#pragma unroll
    for (int i = 0; i < ROWS; ++i) write_fours(values[i], copy + i * 256, copy + i * 256 + 128);
  }

  // Copies a copy to shared memory; each lane waits for what it holds itself.
  __device__ __forceinline__ void start_copy(float* to, const float* from) const {
    __syncwarp();  // what lies there has been read
    const int lane = threadIdx.x % 32 * 4;
#pragma unroll
    for (int four = 0; four < ROWS * 2; ++four)
      copy_async(to + four * 128 + lane, from + four * 128 + lane, true);
  }
  __device__ __forceinline__ void finish_copy() const {
    copies_done();
    __syncwarp();
  }

  // This lane's rows of a vector of the warp's rows.
  __device__ __forceinline__ void read_rows(const float* rows, float (&values)[ROWS]) const {
#pragma unroll
    for (int i = 0; i < ROWS; i += PAIR) {
      if constexpr (PAIR == 2) {
        const float2 two = *reinterpret_cast<const float2*>(rows + row(i));
        values[i] = two.x, values[i + 1] = two.y;
      } else {
        values[i] = rows[row(i)];
      }
    }
  }

  // Sums over a row's lanes. Its first PAIR values are then sums of a lane's first PAIR rows;
  // among the lanes of has_rows each row has one lane.
  __device__ __forceinline__ void sum_rows(float (&values)[ROWS]) const {
    int width = ROWS;
#pragma unroll
    for (int step = 1; step < COLUMN_LANES; step *= 2) {
      if (width > PAIR) {
        width /= 2;
#pragma unroll
        for (int i = 0; i < ROWS / 2; ++i) {
          if (i >= width) break;
          values[i] += __shfl_xor_sync(ALL_LANES, values[i + width], step);
        }
      } else {
#pragma unroll
        for (int i = 0; i < PAIR; ++i) values[i] += __shfl_xor_sync(ALL_LANES, values[i], step);
      }
    }
  }
  __device__ __forceinline__ bool has_rows() const { return column_lane < ROWS / PAIR; }

  // Gives each lane the sums of all its rows.
  __device__ __forceinline__ void share_rows(float (&values)[ROWS]) const {
#pragma unroll
    for (int width = PAIR, step = ROWS / PAIR / 2; step > 0; width *= 2, step /= 2)
#pragma unroll
      for (int i = 0; i < ROWS / 2; ++i) {
        if (i >= width) break;
        values[i + width] = __shfl_xor_sync(ALL_LANES, values[i], step);
      }
  }

  // The sum over a warp's rows of what all lanes of a row hold alike.
  __device__ __forceinline__ float sum_of_rows(float value) const {
#pragma unroll
    for (int step = ROW_LANES / 2; step > 0; step /= 2)
      value += __shfl_xor_sync(ALL_LANES, value, step * COLUMN_LANES);
    return value;
  }

  // Sums each column over the warp's rows and writes the sums to a row of N floats, or adds them.
  // Each halving leaves a lane with half as many columns; every column has one writer.
  __device__ __forceinline__ void sum_columns(float (&values)[LANE_COLUMNS], float* row,
                                              bool add) const {
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
    if (!writer) return;
    constexpr int COUNT = COLUMN_SUMS < 4 ? COLUMN_SUMS : 4;
#pragma unroll
    for (int group = 0; group < COLUMN_SUMS; group += COUNT) {
      float sums[COUNT] = {};
      if (add) load_at<float>(row, column(first + group), sums);
#pragma unroll
      for (int at = 0; at < COUNT; ++at) sums[at] += values[group + at];
      store_at<float>(row, column(first + group), sums);
    }
  }

 private:
  static __device__ __forceinline__ void read_fours(const float* first, const float* second,
                                                    float (&values)[LANE_COLUMNS]) {
    const float4 one = *reinterpret_cast<const float4*>(first);
    const float4 two = *reinterpret_cast<const float4*>(second);
    values[0] = one.x, values[1] = one.y, values[2] = one.z, values[3] = one.w;
    values[4] = two.x, values[5] = two.y, values[6] = two.z, values[7] = two.w;
  }
  static __device__ __forceinline__ void write_fours(const float (&values)[LANE_COLUMNS],
                                                     float* first, float* second) {
    *reinterpret_cast<float4*>(first) = make_float4(values[0], values[1], values[2], values[3]);
    *reinterpret_cast<float4*>(second) = make_float4(values[4], values[5], values[6], values[7]);
  }
};

}  // namespace rwkv_jit
