#pragma once
// Vectors of the compiler's own extension (GCC and Clang).
#include <cstdint>
#include <type_traits>

namespace rwkv_jit {

template <typename Real, int BYTES>
struct VectorOf {
  typedef Real type __attribute__((vector_size(BYTES), may_alias));
};

// The sum of a vector's lanes, by halves: the order depends on the vector's width alone.
template <typename Real, int WIDTH, typename Vector>
inline Real lane_sum(Vector vector) {
#if defined(__GNUC__) && !defined(__clang__)
  using Index = std::conditional_t<sizeof(Real) == 8, int64_t, int32_t>;
  typedef Index Order __attribute__((vector_size(sizeof(Vector))));
  for (int half = WIDTH / 2; half > 0; half /= 2) {
    Order order;
    for (int lane = 0; lane < WIDTH; ++lane) order[lane] = (lane + half) % WIDTH;
    vector += __builtin_shuffle(vector, order);
  }
  return vector[0];
#else
  for (int half = WIDTH / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) vector[lane] += vector[lane + half];
  return vector[0];
#endif
}

}  // namespace rwkv_jit
