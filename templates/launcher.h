// What a launcher is given, and what its library says of itself.
#include <cstdint>

#define RWKV_JIT_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Pointers of absent tensors are null. *_dtype are rwkv_jit::DtypeCode.
struct Arguments {
  // clang-format off
  {{ arguments }}
  // clang-format on
};

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_abi() { return {{abi}}; }
RWKV_JIT_EXPORT const char* rwkv_jit_identity() { return "{{ identity }}"; }

#include "rwkv_jit/layout.h"
