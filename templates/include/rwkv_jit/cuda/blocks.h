#pragma once
// How many blocks a GPU runs at once.
#include <cstdint>

namespace rwkv_jit {

// Of kernels of which a multiprocessor runs so many blocks; 0 where that cannot be told.
inline int64_t blocks_at_once(int per_multiprocessor) {
  int device = 0, multiprocessors = 0;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device) !=
          cudaSuccess)
    return 0;
  return int64_t{multiprocessors} * per_multiprocessor;
}

}  // namespace rwkv_jit
