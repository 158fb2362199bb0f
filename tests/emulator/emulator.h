#pragma once
// What a CUDA source needs of a GPU when it is compiled as plain C++: one block after another, each
// thread a fiber of its own.
#include <cstddef>
#include <cstdint>

namespace emulator {

struct Index {
  unsigned x, y, z;
};

// Runs body(closure) for each thread; 0 or an error. The closure is memory that threads may read.
int run(Index blocks, unsigned threads, size_t shared_bytes, void (*body)(void*), void* closure,
        size_t closure_bytes);

void* shared_memory();
uint32_t shared_offset(const void* pointer);

// Threads of a block, `count` of them or all, meet at a numbered barrier.
void sync(int barrier, int count);
void arrive(int barrier, int count);
// Lanes of a warp meet; what each of them brings and takes are words.
void sync_warp(uint32_t mask);
uint32_t shuffle(uint32_t mask, uint32_t value, int source);
uint32_t match_any(uint32_t mask, uint32_t value);
// sum += a b, of sixteen columns of a, or of eight of tf32.
enum class Operands { HALF, BFLOAT16, TF32 };
void mma(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Operands operands);
void load_matrices(uint32_t (&to)[4], uint32_t shared_address, bool transposed);
uint32_t transpose_matrix(uint32_t pair);
void copy_async(uint32_t to, const void* from, int bytes);
void wait_for_copies();
int atomic_add(int* to, int value);
unsigned lane();

float from_half(uint16_t bits);
uint16_t to_half(float value);
uint16_t to_bfloat16(float value);
uint32_t to_tf32(float value);

}  // namespace emulator

extern emulator::Index threadIdx, blockIdx, gridDim;
