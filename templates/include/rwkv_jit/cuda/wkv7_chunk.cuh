#pragma once
// One chunk of 16 tokens of wkv7, prepared by one warp so that only three products with the state
// are left. c is the running sum of log d over the chunk, P = exp(c), P- = exp(c - log d):
//   A_ab = tril((a P-) (b / P)^T, -1)   A_ak = tril((a P-) (k / P)^T, -1)
//   A_qb = tril((r P) (b / P)^T)        A_qk = tril((r P) (k / P)^T)
//   T = (I - A_ab)^-1   G = T A_ak   W = T (a P-)   R' = r P + A_qb W   M = A_qk + A_qb G
//   K^ = k P_L / P   B^ = b P_L / P   K'' = K^ + G^T B^
//   Y = R' S^T + M V,   S <- S diag(P_L) + (S W^T) B^ + V^T K''
// Factors against the state have exponents of at most 0 and are exact for any decay. In the four
// triangles the two factors meet at the chunk's middle, and there a token's decay is bounded from
// below, by e^-8, so that neither overflows; what lies before such a token counts for nothing.
// Where all decays are BOUNDED so, the former are the latter times what a half of the chunk decays
// by.
#include "rwkv_jit/cuda/chunk_rows.cuh"

namespace rwkv_jit {

// A chunk's tensors as they lie in memory; zeros for tokens that are not there. A wider w is read
// from where it is.
struct Raw {
  Element r[TOKENS][ROW], k[TOKENS][ROW], a[TOKENS][ROW], b[TOKENS][ROW], w[TOKENS][ROW];
};

// Asks for a chunk's tensors.
template <int THREADS, typename Args>
__device__ __forceinline__ void fetch(const Args& args, const Tokens& tokens, int first, int thread,
                                      Raw& raw) {
  if (!is_wide(args.w_dtype)) fetch_rows<TOKENS, THREADS>(args.w, tokens, first, thread, raw.w);
  fetch_rows<TOKENS, THREADS>(args.a, tokens, first, thread, raw.a);
  fetch_rows<TOKENS, THREADS>(args.r, tokens, first, thread, raw.r);
  fetch_rows<TOKENS, THREADS>(args.b, tokens, first, thread, raw.b);
  fetch_rows<TOKENS, THREADS>(args.k, tokens, first, thread, raw.k);
}

constexpr int SOLVED = IS_FP32 ? 20 : TOKENS;  // columns of T and G in shared memory

struct Chunk {
  Element w[TOKENS][ROW];      // W; before that a P-
  Element r[TOKENS][ROW];      // R'
  Element k[TOKENS][ROW];      // K''
  Element b[TOKENS][ROW];      // B^
  float total[CHANNELS];       // P_L
  Element qb[TOKENS][PADDED];  // A_qb
  union {
    Element m[TOKENS][PADDED];    // M
    float right[TOKENS][TOKENS];  // A_ak by columns
  };
  union {
    float lower[TOKENS][20];             // A_ab by columns
    Element solved[2 * TOKENS][SOLVED];  // T and G, by columns
  };
};

// Writes a 16 x 16 float matrix by columns, COLUMN floats apart.
template <int COLUMN>
__device__ __forceinline__ void store_columns(const Accumulator (&matrix)[2],
                                              float (&to)[TOKENS][COLUMN]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int at = 0; at < 4; ++at) to[tile * 8 + 2 * q + at % 2][g + at / 2 * 8] = matrix[tile][at];
}

// Columns of T (lanes 0..15) and of G = T A_ak (lanes 16..31), by substitution in float: column x
// solves (I - A_ab) x = e or A_ak's column. The tensor cores' precision would not do: with repeated
// keys the inverse's entries grow.
__device__ __forceinline__ void solve(Chunk& chunk) {
  const int lane = forgotten_lane();
  float x[TOKENS];
#pragma unroll
  for (int row = 0; row < TOKENS; row += 4) {
    const float4 four = *reinterpret_cast<const float4*>(&chunk.right[lane % 16][row]);
    const float given[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int at = 0; at < 4; ++at)
      x[row + at] = lane < 16 ? (row + at == lane ? 1.0f : 0.0f) : given[at];
  }
#pragma unroll
  for (int column = 0; column < TOKENS - 1; ++column)
#pragma unroll
    for (int row = column / 4 * 4; row < TOKENS; row += 4) {
      const float4 four = *reinterpret_cast<const float4*>(&chunk.lower[column][row]);
      const float factors[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int at = 0; at < 4; ++at)
        if (row + at > column) x[row + at] = fmaf(factors[at], x[column], x[row + at]);
    }
  __syncwarp();  // every lane has read `lower`, whose place this takes
  constexpr int PAIRS = 16 / sizeof(Packed);
  struct alignas(16) Piece {
    Packed at[PAIRS];
  };
#pragma unroll
  for (int first = 0; first < TOKENS / 2; first += PAIRS) {
    Piece piece;
#pragma unroll
    for (int at = 0; at < PAIRS; ++at)
      piece.at[at] = pack(x[2 * (first + at)], x[2 * (first + at) + 1]);
    *reinterpret_cast<Piece*>(&chunk.solved[lane][2 * first]) = piece;
  }
  __syncwarp();
}

enum Triangle { AB, AK, QB, QK, TRIANGLES };

// A chunk is prepared by PARTS warps, each with as many of its channels. What each adds to the
// triangles, as its lanes hold it:
template <int PARTS>
using Partials = float4[PARTS][PARTS == 1 ? 1 : TRIANGLES * 2 * 32];

// How many triangles a warp has the whole of in the end; of more than four warps the first four do.
template <int PARTS>
constexpr int OWN_TRIANGLES = PARTS < TRIANGLES ? TRIANGLES / PARTS : 1;

// Adds up what the warps have of the triangles, each of which leaves it at `partial_of(part)`.
template <int PARTS, typename Place>
__device__ __forceinline__ void add_parts(Accumulator (&sums)[TRIANGLES][2],
                                          const Place& partial_of) {
  if constexpr (PARTS > 1) {
    constexpr int OWN = OWN_TRIANGLES<PARTS>;
    const int lane = threadIdx.x % 32, part = threadIdx.x / 32 % PARTS;
    float4* const own = partial_of(forgotten(part)) + lane;
#pragma unroll
    for (int at = 0; at < TRIANGLES * 2; ++at) {
      const Accumulator& four = sums[at / 2][at % 2];
      own[at * 32] = make_float4(four[0], four[1], four[2], four[3]);
    }
    sync_chunk<PARTS>();
    if (part * OWN >= TRIANGLES) return;
#pragma unroll
    for (int at = 0; at < OWN * 2; ++at) {
      Accumulator& sum = sums[at / 2][at % 2];
      sum[0] = sum[1] = sum[2] = sum[3] = 0.0f;
#pragma unroll
      for (int from = 0; from < PARTS; ++from) {
        const float4 four = partial_of(from)[(part * OWN * 2 + at) * 32 + lane];
        sum[0] += four.x, sum[1] += four.y, sum[2] += four.z, sum[3] += four.w;
      }
    }
  }
}

// Factors inside the triangles times what the chunk's first or second half decays by, which
// `halves` has in its upper or lower rows.
template <int HALF>
__device__ __forceinline__ void scale_by_half(const Accumulator (&inside)[2],
                                              const Accumulator (&halves)[2],
                                              Accumulator (&factors)[2]) {
#pragma unroll
  for (int at = 0; at < 8; ++at)
    factors[at / 4][at % 4] = inside[at / 4][at % 4] * halves[at / 4][2 * HALF + at % 2];
}

// exp2 of sums up to a token: factors against the state before the chunk, by `sums`, and inside the
// triangles, by sums from the middle; of the latter 1 over it, too, where it is wanted.
template <bool BOUNDED, typename... Inverse>
__device__ __forceinline__ void factors_of(const OperandA& sums, const OperandA& from_middle,
                                           const Decays& decays, const Accumulator (&halves)[2],
                                           Accumulator (&factors)[2], Accumulator (&inside)[2],
                                           Inverse&... inverse) {
  if constexpr (!BOUNDED) exp2_of_sums(sums, decays.log_d, factors);
  exp2_of_sums(from_middle, decays.bounded, inside, inverse...);
  if constexpr (BOUNDED) scale_by_half<0>(inside, halves, factors);
}

// This lane's first sixteen bytes of sixteen rows of sixteen channels.
__device__ __forceinline__ float4* kept_place(Element* rows) {
  return reinterpret_cast<float4*>(rows + threadIdx.x % 16 * ROW + threadIdx.x % 32 / 16 * 8);
}

// Rows times factors, kept as floats until what is added to them is known, so that they are rounded
// once: the first tile in shared memory where the sum will be, the second there, too, where an
// element is as large as a float, else in registers, which do not do for both.
__device__ __forceinline__ void keep_rows(const OperandA& rows, const Accumulator (&factors)[2],
                                          Element* first, Accumulator& second) {
  Accumulator both[2];
  widen(rows, both);
  scale(both, factors);
  put(both[0], kept_place(first)[0]);
  if constexpr (IS_FP32) {
    put(both[1], kept_place(first)[1]);
  } else {
#pragma unroll
    for (int at = 0; at < 4; ++at) second[at] = both[1][at];
  }
}
__device__ __forceinline__ void kept_rows(Element* first, const Accumulator& second,
                                          Accumulator (&to)[2]) {
  get(kept_place(first)[0], to[0]);
  if constexpr (IS_FP32) {
    get(kept_place(first)[1], to[1]);
  } else {
#pragma unroll
    for (int at = 0; at < 4; ++at) to[1][at] = second[at];
  }
}

// Rows times factors inside the triangles: PAIRED ones are rounded before, and taken two at once.
template <bool PAIRED>
__device__ __forceinline__ OperandA inside_rows(const OperandA& rows,
                                                const Accumulator (&factors)[2]) {
  if constexpr (!PAIRED) return scaled(rows, factors);
  return times(rows, to_operand<stored>(factors[0], factors[1]));
}
template <bool PAIRED>
__device__ __forceinline__ OperandB inside_rows(const OperandB& rows,
                                                const Accumulator (&factors)[2]) {
  if constexpr (!PAIRED) return scaled(rows, factors);
  return times(rows, to_channels(to_operand<stored>(factors[0], factors[1])));
}

// Prepares the chunk whose tokens are first .. first + 15, by PARTS warps. Those that are not there
// leave the state as it is. PAIRED: see inside_rows. `partial_of`: see add_parts. `when_read` is
// called when the warps are done with `raw`, `when_added` when they are with the partials, too.
template <DecayKind KIND, bool BOUNDED, int PARTS, bool PAIRED, typename Args, typename Place,
          typename Call, typename OtherCall>
__device__ __forceinline__ void prepare(const Args& args, const Tokens& tokens, int first,
                                        const TokenSums& sums, int part, const Raw& raw,
                                        Chunk& chunk, const Place& partial_of,
                                        const Call& when_read, const OtherCall& when_added) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  constexpr int PART_STEPS = CHANNELS / 16 / PARTS, OWN = OWN_TRIANGLES<PARTS>;
  const int first_channel = part * PART_STEPS * 16;
  const auto has = [part](Triangle which) { return part == which / OWN; };
  Accumulator triangles[TRIANGLES][2] = {};
  // The second tiles of r P and K^; see keep_rows.
  Accumulator state_r[PART_STEPS], state_k[PART_STEPS];

#pragma unroll
  for (int step = 0; step < PART_STEPS; ++step) {
    const int channel = first_channel + 16 * step;
    float log_d[8];
    load_log2_decays<KIND, BOUNDED>(args, tokens, first, channel, raw.w, log_d);
    const Decays decays = decays_of<KIND, BOUNDED>(log_d);

    OperandA a, r;
    Accumulator inside[2], inverse[2], factors[2], halves[2];
    if constexpr (BOUNDED) exp2_of_sums(sums.halves(), decays.log_d, halves);
    load<ROW>(&raw.a[0][channel], a);
    factors_of<BOUNDED>(sums.sum_before(), sums.from_middle_before(), decays, halves, factors,
                        inside);
    store_rows(scaled(a, factors), &chunk.w[0][channel]);
    a = inside_rows<PAIRED>(a, inside);
    load<ROW>(&raw.r[0][channel], r);
    factors_of<BOUNDED>(sums.sum_up_to(), sums.from_middle(), decays, halves, factors, inside,
                        inverse);
    keep_rows(r, factors, &chunk.r[0][channel], state_r[step]);
    if (g == 7) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        *reinterpret_cast<float2*>(&chunk.total[channel + 8 * tile + 2 * q]) =
            make_float2(factors[tile][2], factors[tile][3]);
    }
    r = inside_rows<PAIRED>(r, inside);

    OperandB b, k;
    load_transposed<ROW>(&raw.b[0][channel], b);
    load_transposed<ROW>(&raw.k[0][channel], k);
    if constexpr (BOUNDED) {
      scale_by_half<1>(inverse, halves, factors);
    } else {
      exp2_of_sums(sums.sum_after(), decays.log_d, factors);
    }
    store_rows(scaled(b, factors), &chunk.b[0][channel]);
    keep_rows(to_first(k), factors, &chunk.k[0][channel], state_k[step]);
    b = inside_rows<PAIRED>(b, inverse);
    k = inside_rows<PAIRED>(k, inverse);
    add_product(triangles[AB], a, b);
    add_product(triangles[AK], a, k);
    add_product(triangles[QB], r, b);
    add_product(triangles[QK], r, k);
  }
  __syncwarp();
  add_parts<PARTS>(triangles, partial_of);
  const auto triangle = [&triangles](Triangle which) -> Accumulator(&)[2] {
    return triangles[which % OWN];
  };
  if (has(AB)) {
    lower_triangle<true>(triangle(AB));
    store_columns(triangle(AB), chunk.lower);
  }
  if (has(AK)) {
    lower_triangle<true>(triangle(AK));
    store_columns(triangle(AK), chunk.right);
  }
  if (has(QB)) {
    lower_triangle<false>(triangle(QB));
    store_matrix(triangle(QB), chunk.qb[0]);
  }
  when_read();
  sync_chunk<PARTS>();
  when_added();
  if (part == 0) solve(chunk);
  if constexpr (PARTS > 1) sync_chunk<PARTS>();

  OperandA inverse, g_transposed, qb;
  load_transposed<SOLVED>(chunk.solved[0], inverse);
  load<SOLVED>(chunk.solved[TOKENS], g_transposed);
  load<PADDED>(&chunk.qb[0][0], qb);
  if (has(QK)) {
    OperandB columns;
    load_transposed<SOLVED>(chunk.solved[TOKENS], columns);
    lower_triangle<false>(triangle(QK));
    add_product(triangle(QK), qb, columns);
    store_matrix(triangle(QK), chunk.m[0]);
  }

#pragma unroll
  for (int step = 0; step < PART_STEPS; ++step) {
    const int channel = first_channel + 16 * step;
    Accumulator w[2] = {}, r[2], k[2];
    OperandB rows;
    load<ROW>(&chunk.w[0][channel], rows);
    add_product(w, inverse, rows);
    const OperandA rounded = to_operand(w[0], w[1]);
    kept_rows(&chunk.r[0][channel], state_r[step], r);
    kept_rows(&chunk.k[0][channel], state_k[step], k);
    __syncwarp();  // every lane has read what lies where W, R' and K'' come
    store_rows(rounded, &chunk.w[0][channel]);
    add_product(r, qb, to_second(rounded));
    store_rows(to_operand(r[0], r[1]), &chunk.r[0][channel]);
    load<ROW>(&chunk.b[0][channel], rows);
    add_product(k, g_transposed, rows);
    store_rows(to_operand(k[0], k[1]), &chunk.k[0][channel]);
  }
}

}  // namespace rwkv_jit
