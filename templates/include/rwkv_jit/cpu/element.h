#pragma once
// Storage types and their conversion to the type that is computed in.
#include <cmath>
#include <cstdint>
#include <cstring>

namespace rwkv_jit {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
using fp32 = float;
using fp64 = double;

template <typename Element>
struct RealOf {
  using type = float;
};
template <>
struct RealOf<double> {
  using type = double;
};

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline double load(double value) { return value; }
inline float load(float value) { return value; }
inline float load(bf16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }
inline float load(fp16 value) {
  const uint32_t sign = (value.bits & 0x8000u) << 16;
  const uint32_t magnitude = (value.bits & 0x7fffu) << 13;
  const uint32_t rebias = 112u << 23;
  // Subnormals: 2^-14 (1 + m) - 2^-14 is exact, also where denormals are flushed.
  const float subnormal = float_of(magnitude + (113u << 23)) - float_of(113u << 23);
  uint32_t bits = magnitude + rebias;
  bits = magnitude >= 0x0f800000u ? bits + rebias : bits;
  bits = magnitude < 0x00800000u ? bits_of(subnormal) : bits;
  return float_of(bits | sign);
}

inline void store(double& to, double value) { to = value; }
inline void store(float& to, float value) { to = value; }
inline void store(bf16& to, float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}
inline void store(fp16& to, float value) {
  const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, x = bits & 0x7fffffffu;
  // Adding 1/2 leaves the multiple of 2^-24 that is nearest, ties to even, in the low bits.
  const uint32_t subnormal = bits_of(float_of(x) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (x - (112u << 23) + 0xfffu + ((x >> 13) & 1u)) >> 13;
  uint32_t half = x < 0x38800000u ? subnormal : normal;
  half = x >= 0x47800000u ? (x > 0x7f800000u ? 0x7e00u : 0x7c00u) : half;
  to.bits = static_cast<uint16_t>(half | sign);
}
inline void store(double& to, float value) { to = value; }
inline void store(float& to, double value) { to = static_cast<float>(value); }

}  // namespace rwkv_jit
