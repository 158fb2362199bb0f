//% include "element_types.h"

namespace {

__device__ __forceinline__ int64_t state_index(int row, int key) {
  return STATE_IS_KV ? key * N + row : row * N + key;
}

}  // namespace

#include "rwkv_jit/cuda/error.h"
