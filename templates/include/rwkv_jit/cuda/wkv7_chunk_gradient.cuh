#pragma once
// Gradients of one chunk of wkv7, sixteen of its channels to a warp, from its state S0, the gradient
// D of the state after it, and the gradients of the four triangles.
#include "rwkv_jit/cuda/wkv7_chunk.cuh"

namespace rwkv_jit {

// Running sums from the last token back: upper are rows 0..7, lower rows 8..15, one a lane.
__device__ __forceinline__ void running_sum_back(float& upper, float& lower) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    const float above = __shfl_down_sync(0xffffffffu, upper, step);
    const float below = __shfl_down_sync(0xffffffffu, lower, step);
    if (lane + step < 32) upper += above, lower += below;
  }
  upper += __shfl_sync(0xffffffffu, lower, lane % 4);
}

// Each token's value moves to the token before it (TO_EARLIER) or after it; zero comes in. Moving,
// rather than taking a sum's own term off again, keeps sums of tiny terms exact.
template <bool TO_EARLIER>
__device__ __forceinline__ void move_token(float& upper, float& lower) {
  const int lane = threadIdx.x % 32;
  if constexpr (TO_EARLIER) {
    const float across = __shfl_sync(0xffffffffu, lower, lane % 4);
    upper = __shfl_down_sync(0xffffffffu, upper, 4);
    lower = __shfl_down_sync(0xffffffffu, lower, 4);
    if (lane >= 28) upper = across, lower = 0.0f;
  } else {
    const float across = __shfl_sync(0xffffffffu, upper, 28 + lane % 4);
    upper = __shfl_up_sync(0xffffffffu, upper, 4);
    lower = __shfl_up_sync(0xffffffffu, lower, 4);
    if (lane < 4) lower = across, upper = 0.0f;
  }
}

// A tensor's values and factors for a lane's two tokens and four channels, which are those of a
// 16 x 16 operand: value * state is the factor against the state, value * triangle the other one.
struct Factored {
  Operand state, triangle;

  __device__ __forceinline__ void set(const bf16 (&rows)[TOKENS][ROW], int warp,
                                      const float (&state_factor)[2][4],
                                      const float (&triangle_factor)[2][4]) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int x = 2 * side;
        const uint32_t pair = *reinterpret_cast<const uint32_t*>(
            &rows[g + row * 8][channel_of(2 * warp + side, q, 0)]);
        state[row + x] = scaled(pair, state_factor[row][x], state_factor[row][x + 1]);
        triangle[row + x] = scaled(pair, triangle_factor[row][x], triangle_factor[row][x + 1]);
      }
  }
};

// The element of an operand at a lane's token `row` and channel `x` of four.
__device__ __forceinline__ float element(const Operand& operand, int row, int x) {
  const uint32_t pair = operand[row + x / 2 * 2];
  return x % 2 ? high_of(pair) : low_of(pair);
}
// The same of two accumulators side by side.
__device__ __forceinline__ float element(const Accumulator (&sum)[2], int row, int x) {
  return sum[x / 2][row * 2 + x % 2];
}

// Exponents and their factors for a lane's two tokens and four channels.
struct Factors {
  float log_d[2][4];  // log2 d
  float p[2][4], p_before[2][4], to_end[2][4];
  float bounded[2][4], bounded_before[2][4], to_middle[2][4];

  template <DecayKind KIND>
  __device__ __forceinline__ void load(const Raw& raw, bool wide, int warp,
                                       const bool (&valid)[2]) {
    const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const int channel = channel_of(2 * warp + x / 2, q, x % 2);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float w =
            wide ? raw.wide_w[g + row * 8][channel] : __bfloat162float(raw.w[g + row * 8][channel]);
        log_d[row][x] = valid[row] ? log2_decay<KIND>(w) : 0.0f;
      }
      float sum[2] = {log_d[0][x], log_d[1][x]};
      running_sum(sum[0], sum[1]);
      const float end = last_row(sum[1]);
      float near[2] = {fmaxf(log_d[0][x], STRONGEST), fmaxf(log_d[1][x], STRONGEST)};
      running_sum(near[0], near[1]);
      const float middle = last_row(near[0]);
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const float from_middle = near[row] - middle;
        p[row][x] = exp2_fast(sum[row]);
        p_before[row][x] = exp2_fast(sum[row] - log_d[row][x]);
        to_end[row][x] = exp2_fast(end - sum[row]);
        bounded[row][x] = exp2_fast(from_middle);
        bounded_before[row][x] = exp2_fast(from_middle - fmaxf(log_d[row][x], STRONGEST));
        to_middle[row][x] = exp2_fast(-from_middle);
      }
    }
  }
};

// dlog d / dw, from log2 d.
template <DecayKind KIND>
__device__ __forceinline__ float decay_slope(float log2_d) {
  if constexpr (KIND == LOG) return 1.0f;
  const float log_d = log2_d / LOG2_E;
  return KIND == LOGLOG ? log_d : log_d * (1.0f + log_d / 0.60653065971263342f);
}

// sum += left right, where right [token, channel] is given as an operand.
__device__ __forceinline__ void add_transposed(Accumulator (&sum)[2], const Operand& left,
                                               const Operand& right) {
  Operand turned;
  transpose(right, turned);
  mma_pair(sum[0], sum[1], left, turned);
}

}  // namespace rwkv_jit
