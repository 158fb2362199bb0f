namespace {

using Element = rwkv_jit::{{dtype}};
using StateElement = rwkv_jit::{{state_dtype}};
constexpr auto DECAY = static_cast<rwkv_jit::DecayKind>({{decay}});

// w is of the operator's type or float32.
__device__ __forceinline__ float load_decay(const Arguments& args, int64_t at) {
  return args.w_dtype == rwkv_jit::FP32 ? rwkv_jit::load_at<float>(args.w, at)
                                        : rwkv_jit::load_at<Element>(args.w, at);
}

__device__ __forceinline__ int64_t state_index(int row, int key) {
  return STATE_IS_KV ? key * N + row : row * N + key;
}

}  // namespace

RWKV_JIT_EXPORT const char* rwkv_jit_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
