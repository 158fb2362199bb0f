// wkv7 decode, token by token, in float.
//   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/decay.cuh"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/recurrence.cuh"
#include "rwkv_jit/cuda/values.cuh"
//% include "cuda_types.h"
//% include "wkv7_step.h"

//% include "cuda_decode.h"
