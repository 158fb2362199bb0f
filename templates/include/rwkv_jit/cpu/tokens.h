#pragma once
// Rows of N values between memory and the type that is computed in.
#include <algorithm>
#include <cstdint>

#include "rwkv_jit/cpu/element.h"
#include "rwkv_jit/layout.h"

namespace rwkv_jit {

template <typename Element, int N, typename Real>
inline void load_row(const void* from, int64_t row, Real* to) {
  const Element* source = static_cast<const Element*>(from) + row * N;
  for (int j = 0; j < N; ++j) to[j] = static_cast<Real>(load(source[j]));
}

template <typename Element, int N, typename Real>
inline void store_row(const Real* from, void* to, int64_t row) {
  Element* target = static_cast<Element*>(to) + row * N;
  for (int j = 0; j < N; ++j) store(target[j], from[j]);
}

template <typename Element, int N>
inline void clear_row(void* to, int64_t row) {
  std::fill_n(static_cast<Element*>(to) + row * N, N, Element{});
}

// Rows of w and u, which are of the operator's type or float32, and of their gradients.
template <typename Element, int N, typename Real>
inline void load_mixed_row(const void* from, int32_t dtype, int64_t row, Real* to) {
  if (dtype == FP32) {
    load_row<float, N>(from, row, to);
  } else {
    load_row<Element, N>(from, row, to);
  }
}

template <typename Element, int N, typename Real>
inline void store_mixed_row(const Real* from, void* to, int32_t dtype, int64_t row) {
  if (dtype == FP32) {
    store_row<float, N>(from, to, row);
  } else {
    store_row<Element, N>(from, to, row);
  }
}

// Asks for the cache lines that hold COUNT values, aligned to COUNT, that will be read soon: rows
// of one head lie too far apart for the processor to guess. Spread over the arithmetic in between,
// this hides the memory.
template <typename Element, int COUNT>
inline void prefetch_values(const void* from, int64_t first) {
  const char* start = static_cast<const char*>(from) + first * int64_t{sizeof(Element)};
  for (int at = 0; at < COUNT * int{sizeof(Element)}; at += 64)
    __builtin_prefetch(start + at, 0, 1);  // not into the nearest cache, which is full
}

}  // namespace rwkv_jit
