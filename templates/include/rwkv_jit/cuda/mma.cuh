#pragma once
// Tensor-core products of elements with float sums, and the moves between shared memory and
// fragments.
// Lane l is row g = l / 4 and column pair q = l % 4 of a fragment.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "rwkv_jit/cuda/copy.cuh"

namespace rwkv_jit {

// The source that includes this defines Element, bf16 or fp16.
constexpr bool IS_FP16 = std::is_same_v<Element, __half>;
static_assert(IS_FP16 || std::is_same_v<Element, __nv_bfloat16>);

// A 16 x 8 product: (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
using Accumulator = float[4];
// Sixteen rows of 8 TILES columns, in pairs of columns: of each tile (g, 2q and 2q + 1), then
// (g + 8, those). Two tiles are a first operand.
template <int TILES>
struct Rows {
  uint32_t at[2 * TILES];
};
using OperandA = Rows<2>;
// The same, in pairs of rows, for a second operand: of each tile (2q and 2q + 1, g), then (those
// and eight, g).
template <int TILES>
struct Columns {
  uint32_t at[2 * TILES];
};
using OperandB = Columns<2>;

__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (IS_FP16) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}
__device__ __forceinline__ float low_of(uint32_t pair) {
  if constexpr (IS_FP16) return __low2float(*reinterpret_cast<const __half2*>(&pair));
  return __uint_as_float(pair << 16);
}
__device__ __forceinline__ float high_of(uint32_t pair) {
  if constexpr (IS_FP16) return __high2float(*reinterpret_cast<const __half2*>(&pair));
  return __uint_as_float(pair & 0xffff0000u);
}

__device__ __forceinline__ void mma(Accumulator& sum, const OperandA& a, uint32_t b_upper,
                                    uint32_t b_lower) {
  if constexpr (IS_FP16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b_upper), "r"(b_lower));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(b_upper), "r"(b_lower));
  }
}

// sum += a b.
template <int TILES>
__device__ __forceinline__ void add_product(Accumulator (&sum)[TILES], const OperandA& a,
                                            const Columns<TILES>& b) {
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile)
    mma(sum[tile], a, b.at[2 * tile], b.at[2 * tile + 1]);
}

// An accumulator as it lies in memory, as it is or rounded.
__device__ __forceinline__ void put(const Accumulator& from, float4& to) {
  to = make_float4(from[0], from[1], from[2], from[3]);
}
__device__ __forceinline__ void put(const Accumulator& from, uint2& to) {
  to = make_uint2(pack(from[0], from[1]), pack(from[2], from[3]));
}
__device__ __forceinline__ void get(float4 from, Accumulator& to) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}
__device__ __forceinline__ void get(uint2 from, Accumulator& to) {
  to[0] = low_of(from.x), to[1] = high_of(from.x);
  to[2] = low_of(from.y), to[3] = high_of(from.y);
}

// Tiles side by side, rounded.
template <int TILES>
__device__ __forceinline__ Rows<TILES> to_operand(const Accumulator (&tiles)[TILES]) {
  Rows<TILES> rows;
#pragma unroll
  for (int at = 0; at < 2 * TILES; ++at)
    rows.at[at] = pack(tiles[at / 2][at % 2 * 2], tiles[at / 2][at % 2 * 2 + 1]);
  return rows;
}

// The 8 x 8 matrices of a 16 x 16 block, or of its left half: left ones first, or (not DOWN) upper
// ones first; each transposed if TURNED.
template <int STRIDE, bool DOWN, bool TURNED, int COUNT>
__device__ __forceinline__ void load_matrices(const Element* block, uint32_t (&to)[COUNT]) {
  static_assert(COUNT == 4 || (COUNT == 2 && DOWN));
  const int lane = threadIdx.x % 32;
  const int row = DOWN ? lane % 16 : lane % 8 + lane / 16 * 8;
  const int column = DOWN ? lane / 16 * 8 : lane / 8 % 2 * 8;
  const uint32_t from = shared_address(block + row * STRIDE + column);
  if constexpr (COUNT == 2 && TURNED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from));
  } else if constexpr (COUNT == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(to[0]), "=r"(to[1])
                 : "r"(from));
  } else if constexpr (TURNED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  }
}

// The 16 x 16 block at `block`, rows STRIDE apart, or its left half, or its transpose, as an operand.
template <int STRIDE, int TILES>
__device__ __forceinline__ void load(const Element* block, Rows<TILES>& a) {
  load_matrices<STRIDE, true, false>(block, a.at);
}
template <int STRIDE>
__device__ __forceinline__ void load_transposed(const Element* block, OperandA& a) {
  load_matrices<STRIDE, false, true>(block, a.at);
}
template <int STRIDE, int TILES>
__device__ __forceinline__ void load(const Element* block, Columns<TILES>& b) {
  load_matrices<STRIDE, true, true>(block, b.at);
}
template <int STRIDE>
__device__ __forceinline__ void load_transposed(const Element* block, OperandB& b) {
  load_matrices<STRIDE, false, false>(block, b.at);
}

// Each of a fragment's 8 x 8 matrices transposed: a first operand as the second operand that is
// the same matrix, and a fragment of rows as one of columns.
__device__ __forceinline__ uint32_t turned(uint32_t pair) {
  uint32_t to;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(pair));
  return to;
}
template <int TILES>
__device__ __forceinline__ Columns<TILES> to_second(const Rows<TILES>& rows) {
  Columns<TILES> to;
#pragma unroll
  for (int at = 0; at < 2 * TILES; ++at) to.at[at] = turned(rows.at[at]);
  return to;
}

// Waits at a numbered barrier for THREADS threads to come, or to have passed arrive_at.
template <int THREADS>
__device__ __forceinline__ void wait_at(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}
template <int THREADS>
__device__ __forceinline__ void arrive_at(int barrier) {
  __threadfence_block();
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace rwkv_jit
