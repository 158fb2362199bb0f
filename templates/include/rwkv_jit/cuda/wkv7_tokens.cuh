#pragma once
// The tokens of a chunk of wkv7: where their channels lie among the lanes, and their decays.
#include "rwkv_jit/cuda/mma.cuh"
#include "rwkv_jit/layout.h"

namespace rwkv_jit {

using bf16 = __nv_bfloat16;

constexpr int TOKENS = 16;
constexpr int CHANNELS = 64;       // head size
constexpr int ROW = CHANNELS + 8;  // of bf16 in shared memory; the padding keeps banks apart
constexpr float LOG2_E = 1.4426950408889634f;
constexpr float STRONGEST = -10.0f * LOG2_E;  // log2 d inside the triangles

// Tiles hold channels in the order of the fragments: column pair q of tile n is where lane q's
// sixteen channels 8q .. 8q + 7 and 32 + 8q .. 32 + 8q + 7 lie, so that lanes read 16 bytes.
__device__ __forceinline__ int channel_of(int tile, int q, int odd) {
  return tile / 4 * 32 + q * 8 + tile % 4 * 2 + odd;
}

// log2 of the decay factor. Finite, so that differences are; exp2 of the bound is 0.
template <DecayKind KIND>
__device__ __forceinline__ float log2_decay(float w) {
  float log_d = w * LOG2_E;
  if constexpr (KIND == LOGLOG) {
    log_d = -LOG2_E * exp2_fast(w * LOG2_E);
  } else if constexpr (KIND == LOGIT) {
    log_d = -0.60653065971263342f * LOG2_E / (1.0f + exp2_fast(-w * LOG2_E));
  }
  return fmaxf(log_d, -1e4f);
}

// A chunk's tensors as they lie in memory; zeros for tokens that are not there. A w of float32 is
// read from where it is.
struct Raw {
  bf16 r[TOKENS][ROW], k[TOKENS][ROW], a[TOKENS][ROW], b[TOKENS][ROW], w[TOKENS][ROW];
};

// Asks for the rows of one tensor, by one warp.
__device__ __forceinline__ void fetch_rows(const void* from, int64_t heads, int64_t first,
                                           int64_t end, int64_t head, bf16 (&to)[TOKENS][ROW]) {
  constexpr int PIECE = 8, PIECES = CHANNELS / PIECE;
#pragma unroll
  for (int at = threadIdx.x % 32; at < TOKENS * PIECES; at += 32) {
    const int token = at / PIECES, column = at % PIECES * PIECE;
    const bool valid = first + token < end;
    const int64_t row = (valid ? first + token : 0) * heads + head;
    copy_async(&to[token][column], static_cast<const bf16*>(from) + row * CHANNELS + column, valid);
  }
}

// Asks for a chunk's tensors, by one warp; there after copies_done() and a barrier of the warp.
template <typename Args>
__device__ __forceinline__ void fetch(const Args& args, int64_t first, int64_t end, int64_t head,
                                      Raw& raw) {
  if (args.w_dtype != FP32) fetch_rows(args.w, args.H, first, end, head, raw.w);
  fetch_rows(args.a, args.H, first, end, head, raw.a);
  fetch_rows(args.r, args.H, first, end, head, raw.r);
  fetch_rows(args.b, args.H, first, end, head, raw.b);
  fetch_rows(args.k, args.H, first, end, head, raw.k);
}

// A lane's eight channels of one of its two tokens, in pairs.
__device__ __forceinline__ void load_eight(const bf16 (&rows)[TOKENS][ROW], int half, int row,
                                           uint32_t (&pairs)[4]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const uint4 raw = *reinterpret_cast<const uint4*>(&rows[g + row * 8][half * 32 + q * 8]);
  pairs[0] = raw.x, pairs[1] = raw.y, pairs[2] = raw.z, pairs[3] = raw.w;
}

// The same of w, as log2 of the decay factor; a token that is not there decays nothing.
template <DecayKind KIND>
__device__ __forceinline__ void load_decay(const Raw& raw, const float* wide, int half, int row,
                                           bool valid, float (&log_d)[8]) {
  if (wide != nullptr) {
    const float4* from = reinterpret_cast<const float4*>(wide + half * 32 + threadIdx.x % 4 * 8);
    float4 four[2] = {};
    if (valid) four[0] = __ldg(from), four[1] = __ldg(from + 1);
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      log_d[4 * x] = four[x].x, log_d[4 * x + 1] = four[x].y;
      log_d[4 * x + 2] = four[x].z, log_d[4 * x + 3] = four[x].w;
    }
  } else {
    uint32_t pairs[4];
    load_eight(raw.w, half, row, pairs);
#pragma unroll
    for (int x = 0; x < 8; ++x) log_d[x] = x % 2 ? high_of(pairs[x / 2]) : low_of(pairs[x / 2]);
  }
#pragma unroll
  for (int x = 0; x < 8; ++x) log_d[x] = valid ? log2_decay<KIND>(log_d[x]) : 0.0f;
}

// Running sums over the chunk's tokens: upper are rows 0..7, lower rows 8..15, one a lane.
__device__ __forceinline__ void running_sum(float& upper, float& lower) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 4; step < 32; step *= 2) {
    const float above = __shfl_up_sync(0xffffffffu, upper, step);
    const float below = __shfl_up_sync(0xffffffffu, lower, step);
    if (lane >= step) upper += above, lower += below;
  }
  lower += __shfl_sync(0xffffffffu, upper, 28 + lane % 4);
}

// The value of the last row that `value` holds, in every lane of its column.
__device__ __forceinline__ float last_row(float value) {
  return __shfl_sync(0xffffffffu, value, 28 + threadIdx.x % 4);
}

// Running sums of log2 d for eight channels and two tokens of a lane.
struct Sums {
  float log_d[2][8];    // of the token
  float state[2][8];    // up to and with the token
  float bounded[2][8];  // the same with decays bounded, from the chunk's middle
  float end[8];         // over the whole chunk

  template <DecayKind KIND>
  __device__ __forceinline__ void load(const Raw& raw, const float* const (&wide)[2], int half,
                                       const bool (&valid)[2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row)
      load_decay<KIND>(raw, wide[row], half, row, valid[row], log_d[row]);
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      state[0][x] = log_d[0][x], state[1][x] = log_d[1][x];
      running_sum(state[0][x], state[1][x]);
      end[x] = last_row(state[1][x]);
      if constexpr (KIND == LOGIT) {  // its decays are never below the bound
        bounded[0][x] = state[0][x], bounded[1][x] = state[1][x];
      } else {
        bounded[0][x] = fmaxf(log_d[0][x], STRONGEST);
        bounded[1][x] = fmaxf(log_d[1][x], STRONGEST);
        running_sum(bounded[0][x], bounded[1][x]);
      }
      const float middle = last_row(bounded[0][x]);
      bounded[0][x] -= middle, bounded[1][x] -= middle;
    }
  }

  // Exponents of P-, and of its bounded form.
  __device__ __forceinline__ float before(int row, int x) const {
    return state[row][x] - log_d[row][x];
  }
  __device__ __forceinline__ float bounded_before(int row, int x) const {
    return bounded[row][x] - fmaxf(log_d[row][x], STRONGEST);
  }
};

}  // namespace rwkv_jit
