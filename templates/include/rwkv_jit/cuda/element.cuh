#pragma once
// Storage types; everything is computed in float.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "rwkv_jit/layout.h"

namespace rwkv_jit {

using bf16 = __nv_bfloat16;
using fp16 = __half;
using fp32 = float;

__device__ __forceinline__ float load(float value) { return value; }
__device__ __forceinline__ float load(bf16 value) { return __bfloat162float(value); }
__device__ __forceinline__ float load(fp16 value) { return __half2float(value); }

__device__ __forceinline__ void store(float& to, float value) { to = value; }
__device__ __forceinline__ void store(bf16& to, float value) { to = __float2bfloat16_rn(value); }
__device__ __forceinline__ void store(fp16& to, float value) { to = __float2half_rn(value); }

template <typename Element>
__device__ __forceinline__ float load_at(const void* from, int64_t at) {
  return load(static_cast<const Element*>(from)[at]);
}
template <typename Element>
__device__ __forceinline__ void store_at(void* to, int64_t at, float value) {
  store(static_cast<Element*>(to)[at], value);
}

// Neighbours, with one access to memory; the first is aligned to all of them.
template <typename Element, int COUNT>
struct alignas(COUNT * sizeof(Element)) Neighbours {
  Element at[COUNT];
};
template <typename Element, int COUNT>
__device__ __forceinline__ void load_at(const void* from, int64_t at, float (&values)[COUNT]) {
  const auto some =
      *reinterpret_cast<const Neighbours<Element, COUNT>*>(static_cast<const Element*>(from) + at);
#pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] = load(some.at[i]);
}
template <typename Element, int COUNT>
__device__ __forceinline__ void store_at(void* to, int64_t at, const float (&values)[COUNT]) {
  Neighbours<Element, COUNT> some;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) store(some.at[i], values[i]);
  *reinterpret_cast<Neighbours<Element, COUNT>*>(static_cast<Element*>(to) + at) = some;
}

// w and u are of the operator's type or float32, and so are their gradients.
template <typename Element>
__device__ __forceinline__ float load_mixed(const void* from, int32_t dtype, int64_t at) {
  return dtype == FP32 ? load_at<float>(from, at) : load_at<Element>(from, at);
}
template <typename Element, int COUNT>
__device__ __forceinline__ void load_mixed(const void* from, int32_t dtype, int64_t at,
                                           float (&values)[COUNT]) {
  if (dtype == FP32) {
    load_at<float>(from, at, values);
  } else {
    load_at<Element>(from, at, values);
  }
}
template <typename Element, typename Value>
__device__ __forceinline__ void store_mixed(void* to, int32_t dtype, int64_t at,
                                            const Value& value) {
  if (dtype == FP32) {
    store_at<float>(to, at, value);
  } else {
    store_at<Element>(to, at, value);
  }
}

}  // namespace rwkv_jit
