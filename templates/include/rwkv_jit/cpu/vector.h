#pragma once
// Vectors of the compiler's own extension (GCC and Clang).
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace rwkv_jit {

template <typename Real, int BYTES>
struct VectorOf {
  typedef Real type __attribute__((vector_size(BYTES), may_alias));
};

// A value in every lane. Taking zero away is exact and, unlike adding it, nothing to the compiler,
// which then broadcasts from memory.
template <typename Vector, typename Real>
inline Vector splat(Real value) {
  return value - Vector{};
}

// The lanes of a vector, the upper HALF of them moved down.
template <int HALF, typename Vector, size_t... LANE>
inline Vector upper_half(Vector vector, std::index_sequence<LANE...>) {
#if defined(__clang__)
  return __builtin_shufflevector(vector, vector, (LANE + HALF) % sizeof...(LANE)...);
#else
  using Index = std::conditional_t<sizeof(vector[0]) == 8, int64_t, int32_t>;
  typedef Index Order __attribute__((vector_size(sizeof(Vector))));
  return __builtin_shuffle(vector, Order{Index{(LANE + HALF) % sizeof...(LANE)}...});
#endif
}

// The sum of a vector's lanes, by halves: the order depends on the vector's width alone.
template <typename Real, int WIDTH, int HALF = WIDTH / 2, typename Vector>
inline Real lane_sum(Vector vector) {
  if constexpr (HALF == 0) {
    return vector[0];
  } else {
    const auto lanes = std::make_index_sequence<WIDTH>();
    return lane_sum<Real, WIDTH, HALF / 2>(vector + upper_half<HALF>(vector, lanes));
  }
}

// The product of two rows of COUNT vectors.
template <typename Real, int COUNT, typename Vector>
inline Real dot(const Vector* left, const Vector* right) {
  Vector sum = {};
  for (int x = 0; x < COUNT; ++x) sum += left[x] * right[x];
  return lane_sum<Real, sizeof(Vector) / sizeof(Real)>(sum);
}

}  // namespace rwkv_jit
