#pragma once
// A row of any length and alignment, by one block.
#include <type_traits>

#include "rwkv_jit/cuda/element.cuh"

namespace rwkv_jit {

// Calls visit(column, values) for all columns of a row of `row`, which begins at `begin` of an
// aligned tensor: vectors where it is aligned, single values before and after. A thread meets its
// columns in their order.
template <typename Element, int THREADS, typename Visit>
__device__ __forceinline__ void visit_row(const void* row, int64_t begin, int64_t columns,
                                          const Visit& visit) {
  constexpr int WIDTH = 16 / sizeof(Element), AT_ONCE = 4;
  const int64_t offset = (WIDTH - begin % WIDTH) % WIDTH;
  const int64_t first = offset < columns ? offset : columns;
  const int64_t last = first + (columns - first) / WIDTH * WIDTH;
  const auto visit_one = [&](int64_t column) {
    float value[1] = {load_at<Element>(row, begin + column)};
    visit(column, value);
  };
  if (threadIdx.x < first) visit_one(threadIdx.x);
  // All loads of a pass before its arithmetic: they are what there is to wait for.
  for (int64_t from = first + threadIdx.x * WIDTH; from < last; from += AT_ONCE * THREADS * WIDTH) {
    float values[AT_ONCE][WIDTH];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t column = from + i * THREADS * WIDTH;
      if (column < last) load_at<Element>(row, begin + column, values[i]);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const int64_t column = from + i * THREADS * WIDTH;
      if (column < last) visit(column, values[i]);
    }
  }
  if (last + threadIdx.x < columns) visit_one(last + threadIdx.x);
}

}  // namespace rwkv_jit
