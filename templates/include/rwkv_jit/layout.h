#pragma once
// Where things are: shared by CPU and CUDA kernels.
#include <cstdint>

#if defined(__CUDACC__)
#define RWKV_JIT_SHARED_CODE __host__ __device__ __forceinline__
#else
#define RWKV_JIT_SHARED_CODE inline
#endif

namespace rwkv_jit {

enum DtypeCode : int32_t { BF16 = 0, FP16 = 1, FP32 = 2, FP64 = 3, INT32 = 4, INT64 = 5 };
enum DecayKind : int32_t { LOGLOG = 0, LOGIT = 1, LOG = 2, FACTOR = 3 };

// The tokens of one sequence: [begin, end) of all B * T tokens.
struct Sequence {
  int64_t begin;
  int64_t end;
  int64_t first_checkpoint;
  int64_t checkpoints;  // places; one more than chunks where the last chunk is short or missing
};

// Without cu_seqlens sequence s is row s of the batch. Bounds that no packed batch has are clamped,
// so that a bad cu_seqlens cannot make a kernel leave its tensors. The checkpoints of all
// sequences share B * T / L + S places.
template <typename Args>
RWKV_JIT_SHARED_CODE Sequence find_sequence(const Args& args, int64_t s, int64_t chunk_length) {
  int64_t begin = s * args.T, end = begin + args.T;
  if (args.cu_seqlens != nullptr) {
    const bool wide = args.cu_seqlens_dtype == INT64;
    const auto bound = [&](int64_t at) -> int64_t {
      const int64_t value = wide ? static_cast<const int64_t*>(args.cu_seqlens)[at]
                                 : static_cast<const int32_t*>(args.cu_seqlens)[at];
      return value < 0 ? 0 : value > args.T ? args.T : value;
    };
    begin = bound(s);
    end = bound(s + 1);
    end = end < begin ? begin : end;
  }
  return {begin, end, begin / chunk_length + s, end / chunk_length - begin / chunk_length + 1};
}

}  // namespace rwkv_jit
