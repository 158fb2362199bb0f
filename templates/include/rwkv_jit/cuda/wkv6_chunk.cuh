#pragma once
// One chunk of 16 tokens of wkv6. c is the running sum of log d over the chunk, P = exp(c),
// P- = exp(c - log d):
//   R~ = r P-   K^ = k P_L / P   M = tril((r P-) (k / P)^T, -1) + diag((r * u) . k)
//   Y = R~ S^T + M V,   S <- S diag(P_L) + V^T K^
// Factors against the state have exponents of at most 0 and are exact for any decay. In the
// triangle the two factors meet at the chunk's middle, and there a token's decay is bounded from
// below, by e^-8, so that neither overflows; what lies before such a token counts for nothing.
#include "rwkv_jit/cuda/chunk_rows.cuh"

namespace rwkv_jit {

// A chunk's tensors as they lie in memory; zeros for tokens that are not there. A w of float32 is
// read from where it is, and so is one decay of all tokens.
struct Raw {
  Element r[TOKENS][ROW], k[TOKENS][ROW], w[DECAY_PER_TOKEN ? TOKENS : 1][ROW];
};

struct Chunk {
  Element r[TOKENS][ROW];     // R~
  Element k[TOKENS][ROW];     // K^
  float total[CHANNELS];      // P_L
  Element m[TOKENS][PADDED];  // M
};

// Asks for a chunk's tensors.
template <int THREADS, typename Args>
__device__ __forceinline__ void fetch(const Args& args, const Tokens& tokens, int first, int thread,
                                      Raw& raw) {
  if constexpr (DECAY_PER_TOKEN)
    if (args.w_dtype != FP32) fetch_rows<TOKENS, THREADS>(args.w, tokens, first, thread, raw.w);
  fetch_rows<TOKENS, THREADS>(args.r, tokens, first, thread, raw.r);
  fetch_rows<TOKENS, THREADS>(args.k, tokens, first, thread, raw.k);
}

// A chunk is prepared by PARTS warps, each with as many of its channels. What each adds to M, in
// pairs of a row as its lanes hold them:
template <int PARTS>
using Partials = float2[PARTS][4][32];

// Powers of the decays of all channels in shared memory, where all tokens have the same.
struct Powers {
  float exact[TOKENS + 1][CHANNELS + 8];    // d^0 .. d^16
  float from_middle[TOKENS][CHANNELS + 8];  // d^-8 .. d^7, with the bound of the triangle
};
struct NoPowers {};
using DecayTable = std::conditional_t<DECAY_PER_TOKEN, NoPowers, Powers>;

// The factors of sixteen channels of a chunk's tokens, in pairs of a row: P-, P_L / P, and those of
// the triangle's rows and columns.
class TokenFactors {
 public:
  TokenFactors() = default;
  __device__ __forceinline__ explicit TokenFactors(const float (&log2_d)[8])
      : log2_d_(split(log2_d)) {}

  // P- with, in the place of the first token's, P_L.
  __device__ __forceinline__ void before_and_all(Accumulator (&to)[2]) const {
    exp2_of_sums(TokenSums().sum_before_and_all(), log2_d_, to);
  }
  __device__ __forceinline__ void before(Accumulator (&to)[2]) const {
    exp2_of_sums(TokenSums().sum_before(), log2_d_, to);
  }
  __device__ __forceinline__ void after(Accumulator (&to)[2]) const {
    exp2_of_sums(TokenSums().sum_after(), log2_d_, to);
  }
  __device__ __forceinline__ void of_triangle(Accumulator (&rows)[2],
                                              Accumulator (&columns)[2]) const {
    float bounded[8];
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      bounded[2 * at] = low_of(log2_d_.high.at[at]) + low_of(log2_d_.low.at[at]);
      bounded[2 * at + 1] = high_of(log2_d_.high.at[at]) + high_of(log2_d_.low.at[at]);
    }
    bound(bounded);
    const Split parts = split(bounded);
    exp2_of_sums(TokenSums().from_middle_before(), parts, rows);
    exp2_of_sums<true>(TokenSums().from_middle(), parts, columns);
  }
  __device__ __forceinline__ void log2_decays(Accumulator (&to)[2]) const {
    to[0][0] = to[0][1] = to[0][2] = to[0][3] = 0.0f;
    to[1][0] = to[1][1] = to[1][2] = to[1][3] = 0.0f;
    add_product(to, TokenSums().same(), log2_d_);
  }

 private:
  Split log2_d_;
};

// The same from a table, for `count` tokens that are there.
class TableFactors {
 public:
  TableFactors() = default;
  __device__ __forceinline__ TableFactors(const Powers& powers, int channel, int count)
      : powers_(&powers), channel_(channel + threadIdx.x % 4 * 2), count_(count) {}

  __device__ __forceinline__ void before_and_all(Accumulator (&to)[2]) const {
    const int g = threadIdx.x % 32 / 4;
    read(powers_->exact, g == 0 ? count_ : g, g + 8, to);
  }
  __device__ __forceinline__ void before(Accumulator (&to)[2]) const {
    const int g = threadIdx.x % 32 / 4;
    read(powers_->exact, g, g + 8, to);
  }
  __device__ __forceinline__ void after(Accumulator (&to)[2]) const {
    const int last = count_ - 1 - threadIdx.x % 32 / 4;
    read(powers_->exact, max(last, 0), max(last - 8, 0), to);
  }
  __device__ __forceinline__ void of_triangle(Accumulator (&rows)[2],
                                              Accumulator (&columns)[2]) const {
    const int g = threadIdx.x % 32 / 4;
    read(powers_->from_middle, g, g + 8, rows);
    read(powers_->from_middle, 15 - g, 7 - g, columns);
  }

 private:
  template <int ROWS>
  __device__ __forceinline__ void read(const float (&table)[ROWS][CHANNELS + 8], int upper,
                                       int lower, Accumulator (&to)[2]) const {
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      const float2 pair =
          *reinterpret_cast<const float2*>(&table[at % 2 ? lower : upper][channel_ + at / 2 * 8]);
      to[at / 2][at % 2 * 2] = pair.x, to[at / 2][at % 2 * 2 + 1] = pair.y;
    }
  }

  const Powers* powers_;
  int channel_, count_;
};

using Factors = std::conditional_t<DECAY_PER_TOKEN, TokenFactors, TableFactors>;

// What a warp has of sixteen channels of its chunk.
struct Channels {
  OperandA r;
  OperandB k;
  Factors factors;
};

// What a head has for all tokens, in shared memory.
struct HeadTables : DecayTable {
  float bonus[CHANNELS];
};

// The bonus of sixteen channels, as a lane needs it for rows of tokens: [tile, odd].
__device__ __forceinline__ void read_bonus(const HeadTables& tables, int channel,
                                           float (&bonus)[2][2]) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const float2 pair =
        *reinterpret_cast<const float2*>(&tables.bonus[channel + 8 * tile + threadIdx.x % 4 * 2]);
    bonus[tile][0] = pair.x, bonus[tile][1] = pair.y;
  }
}

// log2 of a channel's one decay.
template <DecayKind KIND, typename Args>
__device__ __forceinline__ float log2_decay_of(const Args& args, int64_t head, int channel) {
  return log2_decay<KIND>(
      load_mixed<Element>(args.w, args.w_dtype, decay_row(0, head) * CHANNELS + channel));
}

template <DecayKind KIND, int THREADS, typename Args>
__device__ __forceinline__ void make(const Args&, int64_t, NoPowers&) {}
template <DecayKind KIND, int THREADS, typename Args>
__device__ __forceinline__ void make(const Args& args, int64_t head, Powers& powers) {
  for (int at = threadIdx.x; at < (TOKENS + 1) * CHANNELS; at += THREADS) {
    const int exponent = at / CHANNELS, channel = at % CHANNELS;
    const float log_d = log2_decay_of<KIND>(args, head, channel);
    powers.exact[exponent][channel] = exp2_fast(exponent * log_d);
    if (exponent < TOKENS)
      powers.from_middle[exponent][channel] =
          exp2_fast((exponent - TOKENS / 2) * fmaxf(log_d, STRONGEST));
  }
}

// Fills the tables; they are there after a barrier of the block.
template <DecayKind KIND, int THREADS, typename Args>
__device__ __forceinline__ void make_tables(const Args& args, int64_t head, HeadTables& tables) {
  make<KIND, THREADS>(args, head, tables);
  for (int j = threadIdx.x; j < CHANNELS; j += THREADS)
    tables.bonus[j] = load_mixed<Element>(args.u, args.u_dtype, head * CHANNELS + j);
}

// The factors of sixteen channels of a chunk; 1 for tokens that are not there.
template <DecayKind KIND, typename Args>
__device__ __forceinline__ void load_factors(const Args& args, const Tokens& tokens, int first,
                                             int channel, const Raw& raw, const NoPowers&,
                                             TokenFactors& factors) {
  float log_d[8];
  load_log2_decays<KIND>(args, tokens, first, channel, raw.w, log_d);
  factors = TokenFactors(log_d);
}
template <DecayKind KIND, typename Args>
__device__ __forceinline__ void load_factors(const Args&, const Tokens& tokens, int first,
                                             int channel, const Raw&, const Powers& powers,
                                             TableFactors& factors) {
  factors = TableFactors(powers, channel, min(max(tokens.count - first, 0), TOKENS));
}

// Adds (r * u) . k over these channels to M's diagonal.
__device__ __forceinline__ void add_bonus(const OperandA& r, const OperandB& k,
                                          const float (&bonus)[2][2], float (&diagonal)[2]) {
#pragma unroll
  for (int at = 0; at < 4; ++at) {
    const Packed x = r.at[at], y = k.at[at % 2 * 2 + at / 2];
    float& sum = diagonal[at % 2];
    sum = fmaf(low_of(x) * bonus[at / 2][0], low_of(y), sum);
    sum = fmaf(high_of(x) * bonus[at / 2][1], high_of(y), sum);
  }
}

// Adds up what the warps have of M and writes it.
template <int PARTS>
__device__ __forceinline__ void add_parts(const Accumulator (&sum)[2], Partials<PARTS>& partials,
                                          Chunk& chunk) {
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32 % PARTS;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair)
    partials[part][pair][lane] =
        make_float2(sum[pair / 2][pair % 2 * 2], sum[pair / 2][pair % 2 * 2 + 1]);
  sync_chunk<PARTS>();
  for (int pair = part; pair < 4; pair += PARTS) {
    float2 whole = partials[0][pair][lane];
#pragma unroll
    for (int from = 1; from < PARTS; ++from) {
      const float2 more = partials[from][pair][lane];
      whole.x += more.x, whole.y += more.y;
    }
    *reinterpret_cast<Packed*>(&chunk.m[lane / 4 + pair % 2 * 8][pair / 2 * 8 + lane % 4 * 2]) =
        pack(whole.x, whole.y);
  }
}

// Prepares the chunk whose tokens are first .. first + 15, by PARTS warps. Those that are not there
// leave the state as it is.
template <DecayKind KIND, int PARTS, int STEPS, typename Args>
__device__ __forceinline__ void prepare(const Args& args, const Tokens& tokens, int first,
                                        const Raw& raw, const HeadTables& tables, Chunk& chunk,
                                        Partials<PARTS>& partials, Channels (&channels)[STEPS]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const int first_channel = threadIdx.x / 32 % PARTS * STEPS * 16;
  Accumulator triangle[2] = {};
  float diagonal[2] = {};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const int channel = first_channel + 16 * step;
    auto& [r, k, own] = channels[step];
    load_factors<KIND>(args, tokens, first, channel, raw, tables, own);
    load<ROW>(&raw.r[0][channel], r);
    load_transposed<ROW>(&raw.k[0][channel], k);
    Accumulator factors[2];
    own.before_and_all(factors);
    if (g == 0) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        *reinterpret_cast<float2*>(&chunk.total[channel + 8 * tile + 2 * q]) =
            make_float2(factors[tile][0], factors[tile][1]);
        factors[tile][0] = factors[tile][1] = 1.0f;
      }
    }
    store_rows(scaled(r, factors), &chunk.r[0][channel]);
    own.after(factors);
    store_rows(scaled(k, factors), &chunk.k[0][channel]);
    Accumulator columns[2];
    own.of_triangle(factors, columns);
    add_product(triangle, scaled(r, factors), scaled(k, columns));
    float bonus[2][2];
    read_bonus(tables, channel, bonus);
    add_bonus(r, k, bonus, diagonal);
  }
  lower_triangle<true>(triangle);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    diagonal[half] += __shfl_xor_sync(0xffffffffu, diagonal[half], 1);
    diagonal[half] += __shfl_xor_sync(0xffffffffu, diagonal[half], 2);
    float (&pair)[4] = triangle[half];
    const float own = g / 2 == q ? diagonal[half] : 0.0f;
    pair[2 * half] += g % 2 == 0 ? own : 0.0f;
    pair[2 * half + 1] += g % 2 == 1 ? own : 0.0f;
  }
  add_parts<PARTS>(triangle, partials, chunk);
}

}  // namespace rwkv_jit
