// wkv7 forward, token by token, in float.
//   S_t = S_{t-1} diag(d_t) + (S_{t-1} a_t) b_t^T + v_t k_t^T,   y_t = S_t r_t
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/decay.cuh"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/recurrence.cuh"
//% include "cuda_types.h"
//% include "cuda_tiles.h"
//% include "wkv7_step.h"

//% include "cuda_forward.h"
