#pragma once
// Gradients of one chunk of wkv7, sixteen of its channels to a warp, from its state S0, the
// gradient D of the state after it, and the gradients of the four triangles.
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

  __device__ __forceinline__ void set(const uint2 (&pairs)[2], const float (&state_factor)[2][4],
                                      const float (&triangle_factor)[2][4]) {
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int x = 0; x < 4; x += 2) {
        const uint32_t pair = x == 0 ? pairs[row].x : pairs[row].y;
        state[row + x] = scaled(pair, state_factor[row][x], state_factor[row][x + 1]);
        triangle[row + x] = scaled(pair, triangle_factor[row][x], triangle_factor[row][x + 1]);
      }
  }
};

// What a lane needs of a chunk for its gradients: four neighbouring channels of two tokens; zeros
// for tokens that are not there.
struct Loaded {
  uint2 r[2], k[2], a[2], b[2];
  float w[2][4];

  template <typename Args>
  __device__ __forceinline__ void load(const Args& args, int64_t first, int64_t end, int64_t head) {
    const int g = threadIdx.x % 32 / 4;
    const int channel = channel_of(threadIdx.x / 32 * 2, threadIdx.x % 4, 0);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int64_t token = first + g + row * 8;
      r[row] = k[row] = a[row] = b[row] = make_uint2(0, 0);
      w[row][0] = w[row][1] = w[row][2] = w[row][3] = 0.0f;
      if (token >= end) continue;
      const int64_t at = (token * args.H + head) * CHANNELS + channel;
      const auto pairs = [at](const void* from) {
        return __ldg(reinterpret_cast<const uint2*>(static_cast<const bf16*>(from) + at));
      };
      r[row] = pairs(args.r), k[row] = pairs(args.k);
      a[row] = pairs(args.a), b[row] = pairs(args.b);
      if (args.w_dtype == FP32) {
        const float4 four =
            __ldg(reinterpret_cast<const float4*>(static_cast<const float*>(args.w) + at));
        w[row][0] = four.x, w[row][1] = four.y, w[row][2] = four.z, w[row][3] = four.w;
      } else {
        const uint2 two = pairs(args.w);
        w[row][0] = low_of(two.x), w[row][1] = high_of(two.x);
        w[row][2] = low_of(two.y), w[row][3] = high_of(two.y);
      }
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
  __device__ __forceinline__ void load(const float (&w)[2][4], const bool (&valid)[2]) {
#pragma unroll
    for (int x = 0; x < 4; ++x) {
#pragma unroll
      for (int row = 0; row < 2; ++row)
        log_d[row][x] = valid[row] ? log2_decay<KIND>(w[row][x]) : 0.0f;
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

// Writes a gradient of this lane's two tokens and four channels.
template <typename To>
__device__ __forceinline__ void store_gradient(void* to, int64_t first, int64_t end, int64_t heads,
                                               int64_t head, const float (&values)[2][4]) {
  const int g = threadIdx.x % 32 / 4,
            channel = channel_of(threadIdx.x / 32 * 2, threadIdx.x % 4, 0);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    const int64_t token = first + g + row * 8;
    if (token >= end) continue;
    To* place = static_cast<To*>(to) + (token * heads + head) * CHANNELS + channel;
    if constexpr (sizeof(To) == 2) {
      *reinterpret_cast<uint2*>(place) =
          make_uint2(pack(values[row][0], values[row][1]), pack(values[row][2], values[row][3]));
    } else {
      *reinterpret_cast<float4*>(place) =
          make_float4(values[row][0], values[row][1], values[row][2], values[row][3]);
    }
  }
}

}  // namespace rwkv_jit
