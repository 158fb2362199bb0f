#pragma once
// Neighbouring values between global memory and registers.
#include <cstdint>

#include "rwkv_jit/cuda/element.cuh"

namespace rwkv_jit {

template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// COUNT values that lie side by side, in accesses as wide as they are together, up to 16 bytes.
template <typename Element, int COUNT>
struct Values {
  static constexpr int BYTES = COUNT * sizeof(Element) < 16 ? COUNT * sizeof(Element) : 16;
  static constexpr int EACH = BYTES / sizeof(Element);
  using Access = typename Word<BYTES>::type;

  union Part {
    Access word;
    Element values[EACH];
    __device__ __forceinline__ Part() {}
  };

  static __device__ __forceinline__ void read(const Element* from, float (&values)[COUNT]) {
#pragma unroll
    for (int at = 0; at < COUNT; at += EACH) {
      Part part;
      part.word = *reinterpret_cast<const Access*>(from + at);
#pragma unroll
      for (int i = 0; i < EACH; ++i) values[at + i] = load(part.values[i]);
    }
  }

  static __device__ __forceinline__ void write(const float (&values)[COUNT], Element* to) {
#pragma unroll
    for (int at = 0; at < COUNT; at += EACH) {
      Part part;
#pragma unroll
      for (int i = 0; i < EACH; ++i) store(part.values[i], values[at + i]);
      *reinterpret_cast<Access*>(to + at) = part.word;
    }
  }
};

}  // namespace rwkv_jit
