#pragma once
// What a launcher's code means.

RWKV_JIT_EXPORT const char* rwkv_jit_error(int) { return "out of memory"; }
