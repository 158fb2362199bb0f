#pragma once
// What a launcher's code means.
#include <cuda_runtime.h>

RWKV_JIT_EXPORT const char* rwkv_jit_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
