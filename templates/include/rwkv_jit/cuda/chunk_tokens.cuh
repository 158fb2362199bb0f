#pragma once
// The tokens of a chunk: how they come into shared memory, and their decays.
#include "rwkv_jit/cuda/mma.cuh"
#include "rwkv_jit/layout.h"

namespace rwkv_jit {

constexpr int TOKENS = 16;         // of a chunk
constexpr int CHANNELS = N;        // head size; the source that includes this defines it
constexpr int ROW = CHANNELS + 8;  // in shared memory; the padding keeps banks apart
constexpr int PADDED = 24;         // columns of a matrix [16 x 16] there
constexpr float LOG2_E = 1.4426950408889634f;
// log2 d inside the triangles. Eight tokens of it have to be in the range of the products'
// operands, and for bf16 one such token leaves nothing of what was before it.
constexpr float STRONGEST = (IS_FP16 ? -0.61f : -8.0f) * LOG2_E;
constexpr float SMALLEST_FACTOR = -100.0f;  // log2 d, where w is d

// log2 of the decay factor. Finite, so that differences are; exp2 of the bound is 0, and for FACTOR
// small enough that its square is. BOUNDED: the caller says that none is below STRONGEST; one that
// is counts as that.
template <DecayKind KIND, bool BOUNDED = false>
__device__ __forceinline__ float log2_decay(float w) {
  if constexpr (KIND == FACTOR) return fmaxf(log2f(w), SMALLEST_FACTOR);
  float log_d = w * LOG2_E;
  if constexpr (KIND == LOGLOG) {
    log_d = -LOG2_E * exp2_fast(w * LOG2_E);
  } else if constexpr (KIND == LOGIT) {
    log_d = __fdividef(-0.60653065971263342f * LOG2_E, 1.0f + exp2_fast(-w * LOG2_E));
  }
  return fmaxf(log_d, BOUNDED ? STRONGEST : -1e4f);
}

// Where the tokens of one sequence and head lie in a tensor [B, T, H, N].
struct Tokens {
  int64_t start;  // of the first one's channels
  int stride;     // from a token to the next
  int count;

  __device__ __forceinline__ int64_t at(int token) const { return start + int64_t{token} * stride; }
};

// Asks for rows of a tensor from token `first` on, COUNT of them by THREADS threads of which this
// is `thread`; zeros for tokens that are not there. They are there after copies_done() and a
// barrier of the threads.
template <int COUNT, int THREADS>
__device__ __forceinline__ void fetch_rows(const void* from, const Tokens& tokens, int first,
                                           int thread, Element (*to)[ROW]) {
  constexpr int PIECE = 16 / sizeof(Element), PIECES = CHANNELS / PIECE, STEP = THREADS / PIECES;
  const int row = thread / PIECES, column = thread % PIECES * PIECE;
  if (STEP > COUNT && row >= COUNT) return;
  const Element* source = static_cast<const Element*>(from) + tokens.at(first + row) + column;
#pragma unroll
  for (int at = 0; at < COUNT; at += STEP)
    copy_async(&to[row + at][column], source + at * tokens.stride, first + row + at < tokens.count);
}

// Whether w, or its gradient, is of float32 while the other tensors of tokens are not.
__device__ __forceinline__ bool is_wide(int32_t dtype) { return !IS_FP32 && dtype == FP32; }

// Where the elements of a lane's second operand lie, whose rows are tokens and columns channels:
// element `at` of eight is token operand_token(at) of channel g, or g + 8 from element 4 on.
__device__ __forceinline__ int operand_token(int at) {
  return at / 2 % 2 * 8 + threadIdx.x % 4 * 2 + at % 2;
}

// A float32 w of sixteen channels in that order, from where it is; zero for tokens that are not
// there.
__device__ __forceinline__ void load_wide_decay(const void* from, const Tokens& tokens, int first,
                                                int channel, float (&w)[8]) {
  const float* row =
      static_cast<const float*>(from) + tokens.at(first) + channel + threadIdx.x % 32 / 4;
#pragma unroll
  for (int at = 0; at < 8; ++at) {
    const int token = operand_token(at);
    w[at] = first + token < tokens.count ? __ldg(row + int64_t{token} * tokens.stride + at / 4 * 8)
                                         : 0.0f;
  }
}

// log2 of the decay factors of sixteen of a chunk's channels, in that order; 0 for tokens that are
// not there. `rows` are w's, where it is no wider than the others.
template <DecayKind KIND, bool BOUNDED = false, typename Args>
__device__ __forceinline__ void load_log2_decays(const Args& args, const Tokens& tokens, int first,
                                                 int channel, const Element (&rows)[TOKENS][ROW],
                                                 float (&log_d)[8]) {
  if (is_wide(args.w_dtype)) {
    load_wide_decay(args.w, tokens, first, channel, log_d);
  } else {
    OperandB pairs;
    load<ROW>(&rows[0][channel], pairs);
#pragma unroll
    for (int at = 0; at < 8; ++at)
      log_d[at] = at % 2 ? high_of(pairs.at[at / 2]) : low_of(pairs.at[at / 2]);
  }
#pragma unroll
  for (int at = 0; at < 8; ++at)
    log_d[at] =
        first + operand_token(at) < tokens.count ? log2_decay<KIND, BOUNDED>(log_d[at]) : 0.0f;
}

// Values in two parts, which together keep 16 bits of them or, of fp16 and tf32, 22.
struct Split {
  OperandB high, low;
};

__device__ __forceinline__ Split split(const float (&values)[8]) {
  Split parts;
#pragma unroll
  for (int at = 0; at < 4; ++at) {
    const float x = values[2 * at], y = values[2 * at + 1];
    Packed& high = parts.high.at[at];
    high = pack(x, y);
    parts.low.at[at] = pack(x - low_of(high), y - high_of(high));
  }
  return parts;
}

// The same of a product's tiles.
__device__ __forceinline__ Split split(const Accumulator (&values)[2]) {
  const OperandA high = to_operand(values[0], values[1]);
  Accumulator rest[2];
#pragma unroll
  for (int part = 0; part < 4; ++part) {
    const int tile = part / 2, row = part % 2 * 2;
    rest[tile][row] = values[tile][row] - low_of(high.at[part]);
    rest[tile][row + 1] = values[tile][row + 1] - high_of(high.at[part]);
  }
  return {to_second(high), to_second(to_operand(rest[0], rest[1]))};
}

// Matrices [16 x 16] of 0 and 1 (or -1) that sum over a chunk's tokens: row t is the sum over
// tokens s.
struct TokenSums {
  Packed up_to, before, from, after;  // s <= t, s < t, s >= t, s > t within eight tokens

  explicit __device__ __forceinline__ TokenSums(int lane = threadIdx.x % 32) {
    const int g = lane / 4, x = lane % 4 * 2, y = x + 1;
    up_to = ones(x <= g, y <= g);
    before = ones(x < g, y < g);
    from = ones(x >= g, y >= g);
    after = ones(x > g, y > g);
  }

  // The matrix of 1 that changes nothing.
  __device__ __forceinline__ OperandA same() const {
    const Packed own = less(up_to, before);
    return {own, {}, {}, own};
  }
  __device__ __forceinline__ OperandA sum_up_to() const { return {up_to, all(), {}, up_to}; }
  __device__ __forceinline__ OperandA sum_before() const { return {before, all(), {}, before}; }
  // The first row, whose sum before it is nothing, has the sum of all tokens instead.
  __device__ __forceinline__ OperandA sum_before_and_all() const {
    const bool first = threadIdx.x % 32 < 4;
    return {first ? all() : before, all(), first ? all() : Packed{}, before};
  }
  __device__ __forceinline__ OperandA sum_after() const { return {after, {}, all(), after}; }
  // Rows 0..7 are the sum over the chunk's first half, rows 8..15 over its second.
  __device__ __forceinline__ OperandA halves() const { return {all(), {}, {}, all()}; }
  // From the chunk's middle up to t: what follows t is taken off where t lies before it.
  __device__ __forceinline__ OperandA from_middle() const { return {minus(after), {}, {}, up_to}; }
  __device__ __forceinline__ OperandA from_middle_before() const {
    return {minus(from), {}, {}, before};
  }

 private:
  // A matrix less another of some of its ones, and less all of them; -0 is as good as 0.
  static __device__ __forceinline__ uint32_t less(uint32_t x, uint32_t y) { return x ^ y; }
  static __device__ __forceinline__ float2 less(float2 x, float2 y) {
    return {x.x - y.x, x.y - y.y};
  }
  static __device__ __forceinline__ uint32_t minus(uint32_t x) { return x ^ 0x80008000u; }
  static __device__ __forceinline__ float2 minus(float2 x) { return {-x.x, -x.y}; }
  static __device__ __forceinline__ Packed all() { return ones(true, true); }
  template <typename Pair = Packed>
  static __device__ __forceinline__ Pair ones(bool low, bool high) {
    if constexpr (std::is_same_v<Pair, float2>) {
      return {low ? 1.0f : 0.0f, high ? 1.0f : 0.0f};
    } else {
      constexpr uint32_t ONE = IS_FP16 ? 0x3c00u : 0x3f80u;
      return (low ? ONE : 0u) | (high ? ONE << 16 : 0u);
    }
  }
};

__device__ __forceinline__ void add_product(Accumulator (&sum)[2], const OperandA& a,
                                            const OperandB& b) {
  add_product(sum[0], sum[1], a, b);
}
__device__ __forceinline__ void add_product(Accumulator (&sum)[2], const OperandA& a,
                                            const Split& b) {
  add_product(sum, a, b.high);
  add_product(sum, a, b.low);
}

// log2 d of sixteen channels of a chunk; in the triangles it is bounded from below.
struct Decays {
  Split log_d, bounded;
};

__device__ __forceinline__ void bound(float (&log2_d)[8]) {
#pragma unroll
  for (int at = 0; at < 8; ++at) log2_d[at] = fmaxf(log2_d[at], STRONGEST);
}

// log2_d is bounded on the way, if it is not BOUNDED as it is.
template <DecayKind KIND, bool BOUNDED = KIND == LOGIT>
__device__ __forceinline__ Decays decays_of(float (&log2_d)[8]) {
  const Split log_d = split(log2_d);
  if constexpr (BOUNDED) return {log_d, log_d};
  bound(log2_d);
  return {log_d, split(log2_d)};
}

// exp2 of sums over tokens, or with INVERSE 1 over it.
template <bool INVERSE = false>
__device__ __forceinline__ void exp2_of_sums(const OperandA& sums, const Split& decays,
                                             Accumulator (&factors)[2]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int at = 0; at < 4; ++at) factors[tile][at] = 0.0f;
  add_product(factors, sums, decays);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int at = 0; at < 4; ++at)
      factors[tile][at] = exp2_fast(INVERSE ? -factors[tile][at] : factors[tile][at]);
}

// Both.
__device__ __forceinline__ void exp2_of_sums(const OperandA& sums, const Split& decays,
                                             Accumulator (&factors)[2],
                                             Accumulator (&inverses)[2]) {
  Accumulator logs[2] = {};
  add_product(logs, sums, decays);
#pragma unroll
  for (int at = 0; at < 8; ++at) {
    factors[at / 4][at % 4] = exp2_fast(logs[at / 4][at % 4]);
    inverses[at / 4][at % 4] = exp2_fast(-logs[at / 4][at % 4]);
  }
}

}  // namespace rwkv_jit
