#pragma once
// Rows of a chunk's tokens in fragments: what is done with them elementwise, and where they go.
#include "rwkv_jit/cuda/chunk_tokens.cuh"

namespace rwkv_jit {

// Zeros above the diagonal, and on it if STRICT; selected, as what is there may be infinite.
template <bool STRICT>
__device__ __forceinline__ void lower_triangle(Accumulator (&matrix)[2]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      const int row = g + at / 2 * 8, column = tile * 8 + 2 * q + at % 2;
      const bool keep = STRICT ? row > column : row >= column;
      matrix[tile][at] = keep ? matrix[tile][at] : 0.0f;
    }
}

// A pair of values times a factor each: a tile's factors of token g, or g + 8 if `row` is 1.
__device__ __forceinline__ Packed scaled(Packed pair, const Accumulator& factors, int row) {
  return pack(low_of(pair) * factors[2 * row], high_of(pair) * factors[2 * row + 1]);
}

// Rows of tokens times factors, as a first operand [token, channel] or a second [channel, token].
__device__ __forceinline__ OperandA scaled(const OperandA& rows, const Accumulator (&factors)[2]) {
  OperandA to;
#pragma unroll
  for (int at = 0; at < 4; ++at) to.at[at] = scaled(rows.at[at], factors[at / 2], at % 2);
  return to;
}
__device__ __forceinline__ OperandB scaled(const OperandB& rows, const Accumulator (&factors)[2]) {
  OperandB to;
#pragma unroll
  for (int at = 0; at < 4; ++at) to.at[at] = scaled(rows.at[at], factors[at % 2], at / 2);
  return to;
}

// A second operand [channel, token] as the first operand [token, channel] of the same rows, and
// back.
__device__ __forceinline__ OperandA to_first(const OperandB& rows) {
  return {rows.at[0], rows.at[2], rows.at[1], rows.at[3]};
}
__device__ __forceinline__ OperandB to_channels(const OperandA& rows) {
  return {rows.at[0], rows.at[2], rows.at[1], rows.at[3]};
}

// Writes such rows at a chunk's channels.
__device__ __forceinline__ void store_rows(const OperandA& rows, Element* to) {
  store<ROW>(rows, to);
}
__device__ __forceinline__ void store_rows(const OperandB& rows, Element* to) {
  store_rows(to_first(rows), to);
}
// Writes a matrix [16 x 16], rounded.
__device__ __forceinline__ void store_matrix(const Accumulator (&matrix)[2], Element* to) {
  store<PADDED>(to_operand(matrix[0], matrix[1]), to);
}

// Such rows as accumulators.
__device__ __forceinline__ void widen(const OperandA& rows, Accumulator (&to)[2]) {
#pragma unroll
  for (int at = 0; at < 4; ++at) {
    to[at / 2][at % 2 * 2] = low_of(rows.at[at]);
    to[at / 2][at % 2 * 2 + 1] = high_of(rows.at[at]);
  }
}

// Waits for the warps that prepare the same chunk.
template <int PARTS>
__device__ __forceinline__ void sync_chunk() {
  if constexpr (PARTS == 1) {
    __syncwarp();
  } else {
    wait_at<PARTS * 32>(1 + threadIdx.x / 32 / PARTS);
  }
}

// dlog d / dw, from log2 d.
template <DecayKind KIND>
__device__ __forceinline__ float decay_slope(float log2_d) {
  if constexpr (KIND == FACTOR) return exp2_fast(-log2_d);
  if constexpr (KIND == LOG) return 1.0f;
  const float log_d = log2_d * (1.0f / LOG2_E);
  return KIND == LOGLOG ? log_d : log_d * (1.0f + log_d * (1.0f / 0.60653065971263342f));
}

// Adds what the lane `step` lanes on has, if there is one.
__device__ __forceinline__ void add_from_above(float& value, int step) {
  float above;
  int there;
  asm volatile(
      "{ .reg .pred there; shfl.sync.down.b32 %0|there, %2, %3, 31, -1; selp.b32 %1, 1, 0, there; }"
      : "=f"(above), "=r"(there)
      : "f"(value), "r"(step));
  if (there) value += above;
}

// Sums from the last token back: upper are rows 0..7, lower rows 8..15, one a lane.
__device__ __forceinline__ void running_sum_back(float& upper, float& lower) {
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    add_from_above(upper, step);
    add_from_above(lower, step);
  }
  upper += __shfl_sync(0xffffffffu, lower, threadIdx.x % 4);
}

// Writes a row's pairs of two tiles, of which the left one's place is `to`. Two lanes give each
// other one of 16-bit values, so that a row's are one sector of memory, written at once.
template <typename Pair>
__device__ __forceinline__ void store_row(const Pair& left, const Pair& right, Element* to,
                                          bool valid) {
  if constexpr (IS_FP32) {
    if (!valid) return;
    *reinterpret_cast<Pair*>(to) = left;
    *reinterpret_cast<Pair*>(to + 8) = right;
  } else {
    const bool is_right = threadIdx.x % 2;
    const Pair got = __shfl_xor_sync(0xffffffffu, is_right ? left : right, 1);
    if (!valid) return;
    const uint32_t low = is_right ? got : left, high = is_right ? right : got;
    // As one value, since a struct of both would be written by two stores.
    *reinterpret_cast<uint64_t*>(to + threadIdx.x % 2 * 6) = uint64_t{high} << 32 | low;
  }
}

// Writes a gradient [token, channel] of such pairs.
__device__ __forceinline__ void store_pairs(const Accumulator (&values)[2], void* to, int64_t at,
                                            int token_stride, const bool (&valid)[2]) {
  Element* first = static_cast<Element*>(to) + at;
#pragma unroll
  for (int row = 0; row < 2; ++row)
    store_row(stored(values[0][2 * row], values[0][2 * row + 1]),
              stored(values[1][2 * row], values[1][2 * row + 1]), first + row * 8 * token_stride,
              valid[row]);
}
__device__ __forceinline__ void store_wide_pairs(const Accumulator (&values)[2], void* to,
                                                 int64_t at, int token_stride,
                                                 const bool (&valid)[2]) {
  float* first = static_cast<float*>(to) + at;
#pragma unroll
  for (int part = 0; part < 4; ++part)
    if (valid[part % 2])
      *reinterpret_cast<float2*>(first + part % 2 * 8 * token_stride + part / 2 * 8) =
          make_float2(values[part / 2][part % 2 * 2], values[part / 2][part % 2 * 2 + 1]);
}

// The same of sixteen channels of a chunk's tokens, of which `first` is the first.
struct TokenRows {
  int64_t place;
  int stride;
  bool valid[2];

  __device__ __forceinline__ TokenRows(const Tokens& tokens, int first, int channel)
      : place(tokens.at(first + threadIdx.x % 32 / 4) + channel + threadIdx.x % 4 * 2),
        stride(tokens.stride),
        valid{first + static_cast<int>(threadIdx.x % 32 / 4) < tokens.count,
              first + static_cast<int>(threadIdx.x % 32 / 4) + 8 < tokens.count} {}
};
__device__ __forceinline__ void store_tokens(const Accumulator (&values)[2], void* to,
                                             const Tokens& tokens, int first, int channel) {
  const TokenRows rows(tokens, first, channel);
  store_pairs(values, to, rows.place, rows.stride, rows.valid);
}
__device__ __forceinline__ void store_wide_tokens(const Accumulator (&values)[2], void* to,
                                                  const Tokens& tokens, int first, int channel) {
  const TokenRows rows(tokens, first, channel);
  store_wide_pairs(values, to, rows.place, rows.stride, rows.valid);
}

// Gradients times factors, and others added, elementwise.
__device__ __forceinline__ void scale(Accumulator (&gradient)[2], const Accumulator (&factors)[2]) {
#pragma unroll
  for (int at = 0; at < 8; ++at) gradient[at / 4][at % 4] *= factors[at / 4][at % 4];
}
__device__ __forceinline__ void scale_and_add(Accumulator (&gradient)[2],
                                              const Accumulator (&factors)[2],
                                              const Accumulator (&others)[2]) {
#pragma unroll
  for (int at = 0; at < 8; ++at)
    gradient[at / 4][at % 4] =
        fmaf(gradient[at / 4][at % 4], factors[at / 4][at % 4], others[at / 4][at % 4]);
}

// to += from.
__device__ __forceinline__ void add(const Accumulator (&from)[2], Accumulator (&to)[2]) {
#pragma unroll
  for (int at = 0; at < 8; ++at) to[at / 4][at % 4] += from[at / 4][at % 4];
}

// sum += rows * gradients (or less them), elementwise.
template <bool MINUS = false>
__device__ __forceinline__ void add_overlap(const OperandA& rows, const Accumulator (&gradient)[2],
                                            Accumulator (&sum)[2]) {
  Accumulator wide[2];
  widen(rows, wide);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int at = 0; at < 4; ++at)
      sum[tile][at] =
          fmaf(MINUS ? -wide[tile][at] : wide[tile][at], gradient[tile][at], sum[tile][at]);
}

// The diagonal of a matrix of sixteen channels, for this lane's four, [tile, odd].
__device__ __forceinline__ void diagonal(const Accumulator (&matrix)[2], float (&to)[2][2]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd)
      to[tile][odd] = __shfl_sync(0xffffffffu, matrix[tile][2 * tile + odd], (2 * q + odd) * 4 + q);
}

}  // namespace rwkv_jit
