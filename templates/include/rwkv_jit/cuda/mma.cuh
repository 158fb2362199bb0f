#pragma once
// Tensor-core products of elements with float sums, and the moves between shared memory and
// fragments.
// Lane l is row g = l / 4 and column pair q = l % 4 of a fragment.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "rwkv_jit/cuda/copy.cuh"
#include "rwkv_jit/cuda/element.cuh"

namespace rwkv_jit {

// The source that includes this defines Element: bf16, fp16, or fp32, whose products have operands
// of tf32.
constexpr bool IS_FP16 = std::is_same_v<Element, fp16>, IS_FP32 = std::is_same_v<Element, fp32>;
static_assert(IS_FP16 || IS_FP32 || std::is_same_v<Element, bf16>);

// Two neighbours as a fragment has them: those of 16 bits share a register.
using Packed = Pair<Element>;

// A 16 x 8 product: (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
using Accumulator = float[4];
// A 16 x 16 first operand, in pairs of columns: (g, left), (g + 8, left), (g, right),
// (g + 8, right), where left is columns 2q and 2q + 1, right is those and eight.
struct OperandA {
  Packed at[4];
};
// A 16 x 16 second operand, in pairs of rows: (upper, g), (lower, g), (upper, g + 8),
// (lower, g + 8), where upper is rows 2q and 2q + 1, lower is those and eight.
struct OperandB {
  Packed at[4];
};

__device__ __forceinline__ float low_of(Packed pair) { return load_pair<Element>(pair).x; }
__device__ __forceinline__ float high_of(Packed pair) { return load_pair<Element>(pair).y; }

// A pair as a tensor has it, and as a product takes it.
__device__ __forceinline__ Packed stored(float low, float high) {
  Packed pair;
  store_pair<Element>(pair, make_float2(low, high));
  return pair;
}
__device__ __forceinline__ float to_tf32(float value) {
  uint32_t bits;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm("cvt.rn.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#else  // which later architectures take four instructions for
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
#endif
  return __uint_as_float(bits);
}
__device__ __forceinline__ Packed pack(float low, float high) {
  return IS_FP32 ? stored(to_tf32(low), to_tf32(high)) : stored(low, high);
}

// x y, elementwise.
__device__ __forceinline__ float2 times(float2 x, float2 y) {
  return make_float2(to_tf32(x.x * y.x), to_tf32(x.y * y.y));
}
__device__ __forceinline__ uint32_t times(uint32_t x, uint32_t y) {
  using Two = std::conditional_t<IS_FP16, __half2, __nv_bfloat162>;
  const Two product = __hmul2(reinterpret_cast<const Two&>(x), reinterpret_cast<const Two&>(y));
  return reinterpret_cast<const uint32_t&>(product);
}

// sum += a b: with a first operand and one tile of a second.
__device__ __forceinline__ void mma(Accumulator& sum, const uint32_t (&a)[4], uint32_t b_upper,
                                    uint32_t b_lower) {
  if constexpr (IS_FP16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_upper), "r"(b_lower));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_upper), "r"(b_lower));
  }
}
// Half of a's columns and b's rows. Their order is free, so x lies where the instruction has the
// first four of them, and y where it has the others.
__device__ __forceinline__ void mma(Accumulator& sum, float2 a_upper, float2 a_lower, float2 b) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a_upper.x)), "r"(__float_as_uint(a_lower.x)),
        "r"(__float_as_uint(a_upper.y)), "r"(__float_as_uint(a_lower.y)), "r"(__float_as_uint(b.x)),
        "r"(__float_as_uint(b.y)));
}
__device__ __forceinline__ void mma(Accumulator& sum, const float2 (&a)[4], float2 b_upper,
                                    float2 b_lower) {
  mma(sum, a[0], a[1], b_upper);
  mma(sum, a[2], a[3], b_lower);
}

// sum += a b, sum's columns in two tiles.
__device__ __forceinline__ void add_product(Accumulator& left, Accumulator& right,
                                            const OperandA& a, const OperandB& b) {
  mma(left, a.at, b.at[0], b.at[1]);
  mma(right, a.at, b.at[2], b.at[3]);
}

// An accumulator as it lies in memory.
__device__ __forceinline__ void put(const Accumulator& from, float4& to) {
  to = make_float4(from[0], from[1], from[2], from[3]);
}
__device__ __forceinline__ void get(float4 from, Accumulator& to) {
  to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

// Two tiles side by side, rounded to an operand or, where PAIR is `stored`, as a tensor has them.
template <Packed (*PAIR)(float, float) = pack>
__device__ __forceinline__ OperandA to_operand(const Accumulator& left, const Accumulator& right) {
  return {PAIR(left[0], left[1]), PAIR(left[2], left[3]), PAIR(right[0], right[1]),
          PAIR(right[2], right[3])};
}

template <typename Operand>
__device__ __forceinline__ Operand times(const Operand& x, const Operand& y) {
  return {times(x.at[0], y.at[0]), times(x.at[1], y.at[1]), times(x.at[2], y.at[2]),
          times(x.at[3], y.at[3])};
}

// Pairs of a tensor as a product takes them.
template <typename Pairs>
__device__ __forceinline__ Pairs rounded(Pairs pairs) {
  if constexpr (IS_FP32)
    for (Packed& pair : pairs.at) pair = pack(low_of(pair), high_of(pair));
  return pairs;
}

// Where a 16 x 16 block's element lies: rows are STRIDE apart, or BLOCKED: one 8 x 8 matrix after
// the other, upper left, lower left and so on, whose rows need no padding to be in other banks.
constexpr int BLOCKED = 8;
template <int STRIDE>
__device__ __forceinline__ int place_in_block(int row, int column) {
  if constexpr (STRIDE == BLOCKED) return row * 8 + column / 8 * 128 + column % 8;
  return row * STRIDE + column;
}

// The four 8 x 8 matrices of a 16 x 16 block: left ones first, or (not DOWN) upper ones
// first; each transposed if TURNED.
template <int STRIDE, bool DOWN, bool TURNED>
__device__ __forceinline__ void load_matrices(const float* block, float2 (&to)[4]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int at = 0; at < 4; ++at) {
    const int row = DOWN ? at % 2 * 8 : at / 2 * 8, column = DOWN ? at / 2 * 8 : at % 2 * 8;
    const float* matrix = block + place_in_block<STRIDE>(row, column);
    if constexpr (TURNED) {
      // Where the rows 0 and 4 are in the same banks, half of the lanes read their second value
      // first: 0, 2, 5 and 7 are not.
      const int later = STRIDE % 16 == 8 ? q / 2 : 0;
      const float one = matrix[(2 * q + later) * STRIDE + g],
                  other = matrix[(2 * q + 1 - later) * STRIDE + g];
      to[at] = later ? make_float2(other, one) : make_float2(one, other);
    } else {
      to[at] = *reinterpret_cast<const float2*>(matrix + g * STRIDE + 2 * q);
    }
  }
}
template <int STRIDE, bool DOWN, bool TURNED>
__device__ __forceinline__ void load_matrices(const Element* block, uint32_t (&to)[4]) {
  const int lane = threadIdx.x % 32;
  const int row = DOWN ? lane % 16 : lane % 8 + lane / 16 * 8;
  const int column = DOWN ? lane / 16 * 8 : lane / 8 % 2 * 8;
  const uint32_t from = shared_address(block + place_in_block<STRIDE>(row, column));
  if constexpr (TURNED) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(from));
  }
}

// The 16 x 16 block at `block`, rows STRIDE apart, or its transpose, as an operand.
template <int STRIDE>
__device__ __forceinline__ void load(const Element* block, OperandA& a) {
  load_matrices<STRIDE, true, false>(block, a.at);
}
template <int STRIDE>
__device__ __forceinline__ void load_transposed(const Element* block, OperandA& a) {
  load_matrices<STRIDE, false, true>(block, a.at);
}
template <int STRIDE>
__device__ __forceinline__ void load(const Element* block, OperandB& b) {
  load_matrices<STRIDE, true, true>(block, b.at);
}
template <int STRIDE>
__device__ __forceinline__ void load_transposed(const Element* block, OperandB& b) {
  load_matrices<STRIDE, false, false>(block, b.at);
}

// The same matrices of a first operand, to memory.
template <int STRIDE, typename Pair, typename Value>
__device__ __forceinline__ void store_pairs_of(const Pair (&from)[4], Value* block) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int at = 0; at < 4; ++at)
    *reinterpret_cast<Pair*>(block + place_in_block<STRIDE>(g + at % 2 * 8, at / 2 * 8 + 2 * q)) =
        from[at];
}
template <int STRIDE>
__device__ __forceinline__ void store_matrices(const float2 (&from)[4], float* block) {
  store_pairs_of<STRIDE>(from, block);
}
// At once where that spills no registers.
template <int STRIDE>
__device__ __forceinline__ void store_matrices(const uint32_t (&from)[4], Element* block) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && __CUDA_ARCH__ / 100 != 10
  const int lane = threadIdx.x % 32;
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                   shared_address(block + place_in_block<STRIDE>(lane % 16, lane / 16 * 8))),
               "r"(from[0]), "r"(from[1]), "r"(from[2]), "r"(from[3])
               : "memory");
#else
  store_pairs_of<STRIDE>(from, block);
#endif
}

// Writes a first operand to the 16 x 16 block at `block`, rows STRIDE apart.
template <int STRIDE>
__device__ __forceinline__ void store(const OperandA& a, Element* block) {
  store_matrices<STRIDE>(a.at, block);
}

// Each of a fragment's 8 x 8 matrices transposed: a first operand as the second operand that is
// the same matrix, and a fragment of rows as one of columns.
__device__ __forceinline__ uint32_t turned(uint32_t pair) {
  uint32_t to;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(pair));
  return to;
}
__device__ __forceinline__ float2 turned(float2 pair) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4, from = 8 * q + g / 2;
  // Even rows give x and odd ones y, then the other; even columns take from an even row, then an
  // odd one.
  const bool odd = g % 2 != 0;
  const float one = __shfl_sync(0xffffffffu, odd ? pair.y : pair.x, odd ? from + 4 : from);
  const float other = __shfl_sync(0xffffffffu, odd ? pair.x : pair.y, odd ? from : from + 4);
  return odd ? make_float2(other, one) : make_float2(one, other);
}
__device__ __forceinline__ OperandB to_second(const OperandA& a) {
  return {turned(a.at[0]), turned(a.at[1]), turned(a.at[2]), turned(a.at[3])};
}

// This thread's lane, or a value that all lanes have, as if it were not known to be the same as
// before: what the compiler knows it keeps from chunk to chunk, in registers that may be short.
__device__ __forceinline__ int forgotten_lane() {
  return __shfl_sync(0xffffffffu, threadIdx.x % 32, threadIdx.x % 32);
}
__device__ __forceinline__ int forgotten(int value) { return __shfl_sync(0xffffffffu, value, 0); }

// Waits at a numbered barrier for THREADS threads to come, or to have passed arrive_at. What comes
// before either in a thread comes before what follows in those that wait.
template <int THREADS>
__device__ __forceinline__ void wait_at(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}
template <int THREADS>
__device__ __forceinline__ void arrive_at(int barrier) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
}

// Changes how many registers the threads of four neighbouring warps have, all of which come here;
// to take more, they wait until others have given them.
template <int COUNT>
__device__ __forceinline__ void give_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
#endif
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace rwkv_jit
