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
// below, by e^-10, so that neither overflows; what lies before such a token counts for nothing.
#include "rwkv_jit/cuda/wkv7_tokens.cuh"

namespace rwkv_jit {

struct Chunk {
  bf16 w[TOKENS][ROW];    // W; before that a P-
  bf16 r[TOKENS][ROW];    // R'
  bf16 k[TOKENS][ROW];    // K''; before that K^
  bf16 b[TOKENS][ROW];    // B^
  float total[CHANNELS];  // P_L
  union {
    bf16 m[TOKENS][24];           // M
    float right[TOKENS][TOKENS];  // A_ak by columns
  };
  union {
    float lower[TOKENS][20];          // A_ab by columns
    bf16 solved[2 * TOKENS][TOKENS];  // T and G, by columns
  };
};

// The two k-steps of sixteen channels that a lane's packed pairs make up.
__device__ __forceinline__ void to_operand(const uint32_t (&pairs)[2][4], int step,
                                           Operand& operand) {
  operand[0] = pairs[0][2 * step], operand[1] = pairs[1][2 * step];
  operand[2] = pairs[0][2 * step + 1], operand[3] = pairs[1][2 * step + 1];
}

__device__ __forceinline__ void add_product(Accumulator (&sum)[2], const uint32_t (&left)[2][4],
                                            const uint32_t (&right)[2][4]) {
#pragma unroll
  for (int step = 0; step < 2; ++step) {
    Operand a, b;
    to_operand(left, step, a);
    to_operand(right, step, b);
    mma_pair(sum[0], sum[1], a, b);
  }
}

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

// Writes an accumulator of 8 columns to rows of bf16, COLUMNS apart.
template <int COLUMNS>
__device__ __forceinline__ void store_tile(const Accumulator& tile, bf16* to) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  *reinterpret_cast<uint32_t*>(to + g * COLUMNS + 2 * q) = pack(tile[0], tile[1]);
  *reinterpret_cast<uint32_t*>(to + (g + 8) * COLUMNS + 2 * q) = pack(tile[2], tile[3]);
}

// Columns of T (lanes 0..15) and of G = T A_ak (lanes 16..31), by substitution in float: column x
// solves (I - A_ab) x = e or A_ak's column. The tensor cores' precision would not do: with repeated
// keys the inverse's entries grow.
__device__ __forceinline__ void solve(Chunk& chunk) {
  const int lane = threadIdx.x % 32;
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
  uint4* to = reinterpret_cast<uint4*>(chunk.solved[lane]);
  to[0] = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
  to[1] = make_uint4(pack(x[8], x[9]), pack(x[10], x[11]), pack(x[12], x[13]), pack(x[14], x[15]));
  __syncwarp();
}

// A pair of values times a factor each.
__device__ __forceinline__ uint32_t scaled(uint32_t pair, float low, float high) {
  return pack(low_of(pair) * low, high_of(pair) * high);
}

// Where a lane's pair of channels lies in a chunk's rows.
__device__ __forceinline__ uint32_t* place(bf16 (&rows)[TOKENS][ROW], int half, int row, int pair) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  return reinterpret_cast<uint32_t*>(&rows[g + row * 8][(half * 4 + pair) * 8 + 2 * q]);
}

// Prepares the chunk whose tokens are first .. first + 15, by one warp. Those from `end` on are no
// tokens: they leave the state as it is. A_qb goes to rows of 24 where it is asked for.
template <DecayKind KIND, typename Args>
__device__ __forceinline__ void prepare(const Args& args, int64_t first, int64_t end, int64_t head,
                                        const Raw& raw, Chunk& chunk, bf16* qb_rows = nullptr) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const bool valid[2] = {first + g < end, first + g + 8 < end};
  const float* wide[2] = {nullptr, nullptr};  // this lane's rows of a float32 w
  if (args.w_dtype == FP32) {
    wide[0] = static_cast<const float*>(args.w) + ((first + g) * args.H + head) * CHANNELS;
    wide[1] = wide[0] + 8 * args.H * CHANNELS;
  }
  Accumulator ab[2] = {}, ak[2] = {}, qb[2] = {}, qk[2] = {};
  uint32_t r_state[2][8];

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    Sums sums;
    sums.template load<KIND>(raw, wide, half, valid);
    uint32_t a_pairs[2][4], r_pairs[2][4], other[2][4];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      load_eight(raw.a, half, row, a_pairs[row]);
      load_eight(raw.r, half, row, r_pairs[row]);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int x = 2 * pair, y = x + 1;
        uint32_t &a = a_pairs[row][pair], &r = r_pairs[row][pair];
        *place(chunk.w, half, row, pair) =
            scaled(a, exp2_fast(sums.before(row, x)), exp2_fast(sums.before(row, y)));
        a = scaled(a, exp2_fast(sums.bounded_before(row, x)),
                   exp2_fast(sums.bounded_before(row, y)));
        r_state[row][half * 4 + pair] =
            scaled(r, exp2_fast(sums.state[row][x]), exp2_fast(sums.state[row][y]));
        r = scaled(r, exp2_fast(sums.bounded[row][x]), exp2_fast(sums.bounded[row][y]));
      }
    }
    // From here on the sums are factors: from the token to the chunk's end, and to its middle.
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int x = 0; x < 8; ++x) {
        sums.state[row][x] = exp2_fast(sums.end[x] - sums.state[row][x]);
        sums.bounded[row][x] = exp2_fast(-sums.bounded[row][x]);
      }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      load_eight(raw.b, half, row, other[row]);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t& b = other[row][pair];
        const int x = 2 * pair, y = x + 1;
        *place(chunk.b, half, row, pair) = scaled(b, sums.state[row][x], sums.state[row][y]);
        b = scaled(b, sums.bounded[row][x], sums.bounded[row][y]);
      }
    }
    add_product(ab, a_pairs, other);
    add_product(qb, r_pairs, other);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      load_eight(raw.k, half, row, other[row]);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        uint32_t& k = other[row][pair];
        const int x = 2 * pair, y = x + 1;
        *place(chunk.k, half, row, pair) = scaled(k, sums.state[row][x], sums.state[row][y]);
        k = scaled(k, sums.bounded[row][x], sums.bounded[row][y]);
      }
    }
    add_product(ak, a_pairs, other);
    add_product(qk, r_pairs, other);
    if (g == 0) {
#pragma unroll
      for (int x = 0; x < 8; ++x)
        chunk.total[(half * 4 + x / 2) * 8 + 2 * q + x % 2] = exp2_fast(sums.end[x]);
    }
  }
  lower_triangle<true>(ab);
  lower_triangle<true>(ak);
  lower_triangle<false>(qb);
  lower_triangle<false>(qk);
  if (qb_rows != nullptr) {
    store_tile<24>(qb[0], qb_rows);
    store_tile<24>(qb[1], qb_rows + 8);
  }
  store_columns(ab, chunk.lower);
  store_columns(ak, chunk.right);
  __syncwarp();
  solve(chunk);

  Operand inverse, g_transposed, qb_operand;
  load_transposed<TOKENS>(chunk.solved[0], inverse);
  load_block<TOKENS>(chunk.solved[TOKENS], g_transposed);
  to_operand(qb[0], qb[1], qb_operand);
  mma_pair(qk[0], qk[1], qb_operand, g_transposed);
  store_tile<24>(qk[0], &chunk.m[0][0]);
  store_tile<24>(qk[1], &chunk.m[0][8]);

  Accumulator w[8] = {};
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    Operand block;
    load_transposed<ROW>(&chunk.w[0][16 * pair], block);
    mma_pair(w[2 * pair], w[2 * pair + 1], inverse, block);
  }
  __syncwarp();  // every lane has read a P-, whose place W takes
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) store_tile<ROW>(w[tile], &chunk.w[0][8 * tile]);
  __syncwarp();
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
    Accumulator r[2], k[2];
    Operand block;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int tile = 2 * pair + side;
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const uint32_t k_state = *place(chunk.k, 0, row, tile);
        r[side][2 * row] = low_of(r_state[row][tile]);
        r[side][2 * row + 1] = high_of(r_state[row][tile]);
        k[side][2 * row] = low_of(k_state);
        k[side][2 * row + 1] = high_of(k_state);
      }
    }
    load_transposed<ROW>(&chunk.w[0][16 * pair], block);
    mma_pair(r[0], r[1], qb_operand, block);
    load_transposed<ROW>(&chunk.b[0][16 * pair], block);
    mma_pair(k[0], k[1], g_transposed, block);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      store_tile<ROW>(r[side], &chunk.r[0][8 * (2 * pair + side)]);
      store_tile<ROW>(k[side], &chunk.k[0][8 * (2 * pair + side)]);
    }
  }
}

}  // namespace rwkv_jit
