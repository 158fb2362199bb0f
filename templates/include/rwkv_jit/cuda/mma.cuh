#pragma once
// Tensor-core products of bf16 with float sums, and the moves between shared memory and fragments.
// Lane l is row g = l / 4 and column pair q = l % 4. A fragment of a 16 x 8 product (Accumulator)
// holds rows g and g + 8, columns 2q and 2q + 1; a 16 x 16 operand (Operand) holds the same of its
// left and right halves, which is also the second operand of two products side by side.
#include <cuda_bf16.h>

#include <cstdint>

namespace rwkv_jit {

using Accumulator = float[4];  // (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1)
using Operand = uint32_t[4];   // pairs (g, left), (g + 8, left), (g, right), (g + 8, right)

__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float low_of(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_of(uint32_t pair) {
  return __uint_as_float(pair & 0xffff0000u);
}

// sum += a b, where b holds columns' halves of the sixteen that are summed over.
__device__ __forceinline__ void mma(Accumulator& sum, const Operand& a, uint32_t b_low,
                                    uint32_t b_high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_low), "r"(b_high));
}

// Two products side by side: the second operand's upper half belongs to `left`.
__device__ __forceinline__ void mma_pair(Accumulator& left, Accumulator& right, const Operand& a,
                                         const Operand& b) {
  mma(left, a, b[0], b[2]);
  mma(right, a, b[1], b[3]);
}

// Two 16 x 8 accumulators side by side, rounded to an operand.
__device__ __forceinline__ void to_operand(const Accumulator& left, const Accumulator& right,
                                           Operand& operand) {
  operand[0] = pack(left[0], left[1]);
  operand[1] = pack(left[2], left[3]);
  operand[2] = pack(right[0], right[1]);
  operand[3] = pack(right[2], right[3]);
}

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The 16 x 16 block of bf16 at `block`, rows STRIDE apart, as an operand.
template <int STRIDE>
__device__ __forceinline__ void load_block(const __nv_bfloat16* block, Operand& operand) {
  const int lane = threadIdx.x % 32;
  const __nv_bfloat16* row = block + (lane % 16) * STRIDE + lane / 16 * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(operand[0]), "=r"(operand[1]), "=r"(operand[2]), "=r"(operand[3])
               : "r"(shared_address(row)));
}

// The transpose of the 16 x 16 block at `block`, as an operand.
template <int STRIDE>
__device__ __forceinline__ void load_transposed(const __nv_bfloat16* block, Operand& operand) {
  const int lane = threadIdx.x % 32;
  const __nv_bfloat16* row = block + (lane % 8 + lane / 16 * 8) * STRIDE + lane / 8 % 2 * 8;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(operand[0]), "=r"(operand[1]), "=r"(operand[2]), "=r"(operand[3])
               : "r"(shared_address(row)));
}

// The transpose of a 16 x 16 operand, without shared memory.
__device__ __forceinline__ void transpose(const Operand& from, Operand& to) {
  constexpr int SOURCES[4] = {0, 2, 1, 3};
#pragma unroll
  for (int at = 0; at < 4; ++at)
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to[at]) : "r"(from[SOURCES[at]]));
}

// Sixteen bytes to shared memory, or zeros where `valid` is false; not there before copies_done().
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;"); }

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace rwkv_jit
