// Every value of the configuration enters here, once; the rest of the source is plain C++ or CUDA.
#include <cstdint>

#define RWKV_JIT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Pointers of absent tensors are null. *_dtype are rwkv_jit::DtypeCode.
struct Arguments {
  // clang-format off
  {{ arguments }}
  // clang-format on
};

constexpr int N = {{head_size}};  // head size
// Tokens between two checkpoints.
[[maybe_unused]] constexpr int L = {{chunk_length}};
constexpr bool STATE_IS_KV = {{state_is_kv}};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_abi() { return {{abi}}; }
RWKV_JIT_EXPORT const char* rwkv_jit_identity() { return "{{ identity }}"; }

#include "rwkv_jit/layout.h"
