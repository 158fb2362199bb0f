#pragma once
// Rows of N values between memory and the type that is computed in.
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

// A row of w, which is of the operator's type or float32.
template <typename Element, int N, typename Real>
inline void load_decay_row(const void* from, int32_t dtype, int64_t row, Real* to) {
  if (dtype == FP32) {
    load_row<float, N>(from, row, to);
  } else {
    load_row<Element, N>(from, row, to);
  }
}

// Asks for a row that will be read soon: rows of one head lie too far apart for the processor to
// guess.
template <typename Element, int N>
inline void prefetch_row(const void* from, int64_t row) {
  const char* first = static_cast<const char*>(from) + row * N * sizeof(Element);
  for (unsigned at = 0; at < N * sizeof(Element); at += 64) __builtin_prefetch(first + at);
}

}  // namespace rwkv_jit
