#pragma once
// The order in which the CPU kernels keep the state S [value, key]: blocks of ROWS rows, and in a
// block key by key, so that a vector holds one key of several rows and no sum over keys ever
// crosses lanes. The last block is narrower where ROWS does not divide N.
#include <cstdint>

namespace rwkv_jit {

template <int N, int ROWS>
inline int64_t packed_index(int row, int key) {
  const int first = row / ROWS * ROWS;
  const int width = N - first < ROWS ? N - first : ROWS;
  return static_cast<int64_t>(first) * N + static_cast<int64_t>(key) * width + (row - first);
}

template <int N, bool KEY_FIRST>
inline int64_t state_index(int row, int key) {
  return KEY_FIRST ? key * N + row : row * N + key;
}

}  // namespace rwkv_jit
