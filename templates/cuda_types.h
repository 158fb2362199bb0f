namespace {

using Element = rwkv_jit::{{dtype}};
using StateElement = rwkv_jit::{{state_dtype}};
constexpr auto DECAY = static_cast<rwkv_jit::DecayKind>({{decay}});

__device__ __forceinline__ int64_t state_index(int row, int key) {
  return STATE_IS_KV ? key * N + row : row * N + key;
}

}  // namespace

#include "rwkv_jit/cuda/error.h"
