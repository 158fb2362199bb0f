#pragma once
// A row of any length, a vector at a time.
#include <algorithm>
#include <cstdint>

#include "rwkv_jit/cpu/element.h"
#include "rwkv_jit/cpu/vector.h"

namespace rwkv_jit {

// Calls visit(column, x, count) for all columns of `row`: x has `count` of them, and `fill` after
// the last.
template <int BYTES, typename Element, typename Visit>
void visit_row(const Element* row, int64_t columns, typename RealOf<Element>::type fill,
               const Visit& visit) {
  using Real = typename RealOf<Element>::type;
  using Vector = typename VectorOf<Real, BYTES>::type;
  constexpr int64_t WIDTH = BYTES / sizeof(Real);
  for (int64_t column = 0; column < columns; column += WIDTH) {
    Vector x;
    const int count = static_cast<int>(std::min(WIDTH, columns - column));
    if (count == WIDTH) {
      for (int i = 0; i < WIDTH; ++i) x[i] = load(row[column + i]);
    } else {
      for (int i = 0; i < WIDTH; ++i) x[i] = i < count ? load(row[column + i]) : fill;
    }
    visit(column, x, count);
  }
}

}  // namespace rwkv_jit
