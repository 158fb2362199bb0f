#pragma once
// Storage types; everything is computed in float.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

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

// Two neighbours as registers hold them: 16-bit types share one.
template <typename Element>
struct PairOf {
  using type = uint32_t;
};
template <>
struct PairOf<float> {
  using type = float2;
};
template <typename Element>
using Pair = typename PairOf<Element>::type;

template <typename Element>
__device__ __forceinline__ float2 load_pair(const Pair<Element>& pair) {
  if constexpr (std::is_same_v<Element, bf16>) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
  } else if constexpr (std::is_same_v<Element, fp16>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return pair;
  }
}
template <typename Element>
__device__ __forceinline__ void store_pair(Pair<Element>& to, const float2& values) {
  if constexpr (std::is_same_v<Element, bf16>) {
    *reinterpret_cast<__nv_bfloat162*>(&to) = __floats2bfloat162_rn(values.x, values.y);
  } else if constexpr (std::is_same_v<Element, fp16>) {
    *reinterpret_cast<__half2*>(&to) = __floats2half2_rn(values.x, values.y);
  } else {
    to = values;
  }
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
