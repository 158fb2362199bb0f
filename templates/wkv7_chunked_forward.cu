// wkv7 forward on tensor cores: one block per sequence and head, four chunks of 16 tokens a time.
// Each warp prepares one of the four chunks, which needs no state; then all warps take the state
// through the four, each with 16 of its rows: S [value, key] stays in registers, in float.
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/wkv7_chunk.cuh"
//% include "chunked_types.h"

namespace {

using namespace rwkv_jit;

struct Shared {
  Chunk chunks[WARPS];
  Raw raw[WARPS];
  bf16 v[SPAN][ROW];
};

// Y for this warp's 16 values of a chunk, and the state after it.
__device__ __forceinline__ void scan_chunk(const Arguments& args, int64_t first, int64_t end,
                                           int64_t head, const Chunk& chunk, const bf16* v,
                                           Accumulator (&state)[8]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4, value = threadIdx.x / 32 * 16;
  Accumulator u[2] = {}, y[2] = {};
  Operand values, block;
  load_transposed<ROW>(v + value, values);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    Operand rows;
    to_operand(state[2 * step], state[2 * step + 1], rows);
    load_block<ROW>(&chunk.w[0][16 * step], block);
    mma_pair(u[0], u[1], rows, block);  // S W^T
    load_block<ROW>(&chunk.r[0][16 * step], block);
    mma_pair(y[0], y[1], block, rows);  // R' S^T
  }
  load_block<24>(&chunk.m[0][0], block);
  mma_pair(y[0], y[1], block, values);  // M V
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int64_t token = first + g + row * 8;
      if (token >= end) continue;
      bf16* to =
          static_cast<bf16*>(args.y) + (token * args.H + head) * N + value + tile * 8 + 2 * q;
      *reinterpret_cast<uint32_t*>(to) = pack(y[tile][2 * row], y[tile][2 * row + 1]);
    }
  Operand u_operand;
  to_operand(u[0], u[1], u_operand);
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int tile = 2 * pair + side;
      const float2 decay = *reinterpret_cast<const float2*>(&chunk.total[8 * tile + 2 * q]);
      state[tile][0] *= decay.x, state[tile][1] *= decay.y;
      state[tile][2] *= decay.x, state[tile][3] *= decay.y;
    }
    load_transposed<ROW>(&chunk.b[0][16 * pair], block);
    mma_pair(state[2 * pair], state[2 * pair + 1], u_operand, block);
    load_transposed<ROW>(&chunk.k[0][16 * pair], block);
    mma_pair(state[2 * pair], state[2 * pair + 1], values, block);
  }
}

__device__ __forceinline__ void store_checkpoint(const Arguments& args, int64_t head, int64_t place,
                                                 const Accumulator (&state)[8]) {
  if (args.checkpoints == nullptr) return;
  float4* to = checkpoint_place(args, head, place);
#pragma unroll
  for (int tile = 0; tile < 8; ++tile)
    to[tile * 32] = make_float4(state[tile][0], state[tile][1], state[tile][2], state[tile][3]);
}

__global__ void __launch_bounds__(WARPS * 32, 2) forward_kernel(const Arguments args) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int warp = threadIdx.x / 32;
  const int64_t head_index = blockIdx.x;  // s * H + head
  const int64_t head = head_index % args.H;
  const Sequence sequence = find_sequence(args, head_index / args.H, SPAN);

  Accumulator state[8];
  load_state(args.initial_state, head_index, state);
  int64_t checkpoint = sequence.first_checkpoint;
  fetch(args, sequence.begin + warp * TOKENS, sequence.end, head, shared.raw[warp]);
  for (int64_t first = sequence.begin; first < sequence.end; first += SPAN) {
    store_checkpoint(args, head, checkpoint++, state);
    const int64_t own = first + warp * TOKENS;
    copies_done();
    __syncthreads();  // and the last span's readers are done
    copy_rows(args.v, args.H, first, sequence.end, head, shared.v);
    prepare<DECAY>(args, own, sequence.end, head, shared.raw[warp], shared.chunks[warp]);
    copies_done();
    __syncthreads();
    fetch(args, own + SPAN, sequence.end, head, shared.raw[warp]);
    for (int chunk = 0; chunk < WARPS && first + chunk * TOKENS < sequence.end; ++chunk)
      scan_chunk(args, first + chunk * TOKENS, sequence.end, head, shared.chunks[chunk],
                 shared.v[chunk * TOKENS], state);
  }
  copies_done();
  // A place that no span needs is written all the same, so that no output is left undefined.
  if (checkpoint < sequence.first_checkpoint + sequence.checkpoints)
    store_checkpoint(args, head, checkpoint, state);
  store_state(state, args.final_state, head_index);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t blocks = args->S * args->H;
  if (blocks == 0) return cudaSuccess;
  const int bytes = sizeof(Shared);
  static_assert(sizeof(Shared) == SHARED_BYTES, "the spec knows how much it is");
  const cudaError_t error =
      cudaFuncSetAttribute(forward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const auto stream = static_cast<cudaStream_t>(args->stream);
  forward_kernel<<<static_cast<unsigned>(blocks), WARPS * 32, bytes, stream>>>(*args);
  return cudaGetLastError();
}
