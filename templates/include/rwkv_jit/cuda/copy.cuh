#pragma once
// Copies to shared memory behind the threads' backs.
#include <cstdint>

namespace rwkv_jit {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Sixteen bytes to shared memory, or zeros where `valid` is false; not there before copies_done().
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0));
}
__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;"); }

// Asks for a line of 128 bytes that is read soon.
__device__ __forceinline__ void prefetch(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

}  // namespace rwkv_jit
