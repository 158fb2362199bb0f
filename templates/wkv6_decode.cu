// wkv6 and wkv5 decode, token by token, in float.
//   y_t = (S_{t-1} + v_t (u * k_t)^T) r_t,   S_t = S_{t-1} diag(d_t) + v_t k_t^T
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/decay.cuh"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/recurrence.cuh"
#include "rwkv_jit/cuda/values.cuh"
//% include "cuda_types.h"
//% include "wkv6_step.h"

//% include "cuda_decode.h"
