#pragma once
// The part of CUDA that the templates use.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one after another, so one place serves them all.
#define __shared__ static

using cudaStream_t = void*;
enum cudaError_t : int { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetLastError();
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = 8, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned columns, unsigned rows = 1, unsigned layers = 1) : x(columns), y(rows), z(layers) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

template <typename To, typename From>
To emulator_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
inline float __uint_as_float(unsigned bits) { return emulator_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return emulator_cast<unsigned>(value); }
inline float __expf(float x) { return expf(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename Value>
Value __ldg(const Value* from) {
  return *from;
}
template <typename Value>
Value __ldcg(const Value* from) {
  return *from;
}
template <typename Value>
Value min(Value a, Value b) {
  return b < a ? b : a;
}
template <typename Value>
Value max(Value a, Value b) {
  return a < b ? b : a;
}

inline int atomicAdd(int* to, int value) { return emulator::atomic_add(to, value); }
inline void __syncthreads() { emulator::sync(0, 0); }
inline void __syncwarp(unsigned mask = ~0u) { emulator::sync_warp(mask); }
inline void __threadfence_block() {}
inline void __threadfence() {}
inline void __nanosleep(unsigned) {}
template <typename Value>
Value __shfl_sync(unsigned mask, Value value, int source, int width = 32) {
  const int first = static_cast<int>(emulator::lane()) / width * width;
  const auto word = emulator_cast<uint32_t>(value);
  return emulator_cast<Value>(emulator::shuffle(mask, word, first + source % width));
}
template <typename Value>
Value __shfl_xor_sync(unsigned mask, Value value, int lanes) {
  const int source = static_cast<int>(emulator::lane()) ^ lanes;
  return emulator_cast<Value>(emulator::shuffle(mask, emulator_cast<uint32_t>(value), source));
}
template <typename Value>
unsigned __match_any_sync(unsigned mask, Value value) {
  return emulator::match_any(mask, emulator_cast<uint32_t>(value));
}
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return emulator::shared_offset(pointer);
}

// kernel<<<blocks, threads, bytes, stream>>>(arguments) is Launch{...}([=] { kernel(arguments); }).
namespace emulator {

struct Launch {
  dim3 blocks;
  unsigned threads;
  size_t shared_bytes;
  cudaStream_t stream;

  template <typename Kernel>
  void operator()(Kernel kernel) const {
    const auto call = [](void* self) { (*static_cast<Kernel*>(self))(); };
    run({blocks.x, blocks.y, blocks.z}, threads, shared_bytes, call, &kernel, sizeof kernel);
  }
};

}  // namespace emulator

// An instruction of PTX is the function of its name, results first.
namespace ptx {

inline void cvt_rn_f16x2_f32(uint32_t& pair, float high, float low) {
  pair = static_cast<uint32_t>(emulator::to_half(high)) << 16 | emulator::to_half(low);
}
inline void cvt_rn_bf16x2_f32(uint32_t& pair, float high, float low) {
  pair = static_cast<uint32_t>(emulator::to_bfloat16(high)) << 16 | emulator::to_bfloat16(low);
}
inline void mov_b32(uint32_t& bits, float value) { bits = __float_as_uint(value); }
inline void cvt_rna_tf32_f32(uint32_t& bits, float value) { bits = emulator::to_tf32(value); }
inline void mma(float& c0, float& c1, float& c2, float& c3, const uint32_t (&a)[4],
                const uint32_t (&b)[2], emulator::Operands operands) {
  float sum[4] = {c0, c1, c2, c3};
  emulator::mma(sum, a, b, operands);
  c0 = sum[0], c1 = sum[1], c2 = sum[2], c3 = sum[3];
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(float& c0, float& c1, float& c2,
                                                              float& c3, uint32_t a0, uint32_t a1,
                                                              uint32_t a2, uint32_t a3, uint32_t b0,
                                                              uint32_t b1) {
  mma(c0, c1, c2, c3, {a0, a1, a2, a3}, {b0, b1}, emulator::Operands::HALF);
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(float& c0, float& c1, float& c2,
                                                                float& c3, uint32_t a0, uint32_t a1,
                                                                uint32_t a2, uint32_t a3,
                                                                uint32_t b0, uint32_t b1) {
  mma(c0, c1, c2, c3, {a0, a1, a2, a3}, {b0, b1}, emulator::Operands::BFLOAT16);
}
inline void mma_sync_aligned_m16n8k8_row_col_f32_tf32_tf32_f32(float& c0, float& c1, float& c2,
                                                               float& c3, uint32_t a0, uint32_t a1,
                                                               uint32_t a2, uint32_t a3,
                                                               uint32_t b0, uint32_t b1) {
  mma(c0, c1, c2, c3, {a0, a1, a2, a3}, {b0, b1}, emulator::Operands::TF32);
}
inline void ldmatrix(uint32_t& d0, uint32_t& d1, uint32_t& d2, uint32_t& d3, uint32_t from,
                     bool transposed) {
  uint32_t to[4];
  emulator::load_matrices(to, from, transposed);
  d0 = to[0], d1 = to[1], d2 = to[2], d3 = to[3];
}
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& d0, uint32_t& d1, uint32_t& d2,
                                                     uint32_t& d3, uint32_t from) {
  ldmatrix(d0, d1, d2, d3, from, false);
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& d0, uint32_t& d1, uint32_t& d2,
                                                           uint32_t& d3, uint32_t from) {
  ldmatrix(d0, d1, d2, d3, from, true);
}
inline void movmatrix_sync_aligned_m8n8_trans_b16(uint32_t& to, uint32_t from) {
  to = emulator::transpose_matrix(from);
}
inline void shfl_sync_down_b32(float& to, int& there, float from, int lanes) {
  const int lane = static_cast<int>(emulator::lane());
  there = lane + lanes < 32;
  to = emulator_cast<float>(
      emulator::shuffle(~0u, emulator_cast<uint32_t>(from), there ? lane + lanes : lane));
}
inline void bar_sync(int barrier, int threads) { emulator::sync(barrier, threads); }
inline void bar_arrive(int barrier, int threads) { emulator::arrive(barrier, threads); }
inline void ex2_approx_ftz_f32(float& y, float x) {
  y = exp2f(x);
  if (y < 1.17549435e-38f) y = 0.0f;
}
inline void cp_async_cg_shared_global(uint32_t to, const void* from, int bytes) {
  emulator::copy_async(to, from, bytes);
}
inline void cp_async_wait_all() { emulator::wait_for_copies(); }
inline void prefetch_global_L2(const void*) {}

}  // namespace ptx
