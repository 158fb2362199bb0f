// wkv7 forward on tensor cores: one block per sequence and head, a span of CHUNKS chunks of 16
// tokens a time. Its warps prepare the chunks side by side, which needs no state; then all warps
// take the state through them, each with 16 of its rows: S [value, key] stays in registers, in
// float.
#include <cuda_runtime.h>

#include <type_traits>

//% include "prelude.h"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/wkv7_chunk.cuh"
//% include "chunked_types.h"
//% include "wkv7_chunked_state.h"
//% include "cuda_sequences.h"

namespace {

using namespace rwkv_jit;

constexpr bool BOUNDED = {{bounded}};  // no decay is below e^-10
static_assert(WARPS == STATE_WARPS);

struct Shared {
  Chunk chunks[CHUNKS];
  Raw raw[CHUNKS];
  bf16 v[SPAN][ROW];
  Partials partials[CHUNKS];
};

// Y^T for this warp's 16 values of a chunk, and the state after it.
__device__ __forceinline__ void scan_chunk(const Arguments& args, const Tokens& tokens, int first,
                                           const Chunk& chunk, const bf16* v, State& state) {
  Accumulator u[2] = {}, y[2] = {};
  OperandA values;
  OperandB right;
  load_transposed<ROW>(v + own_value(), values);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const OperandA rows = to_operand(state[step][0], state[step][1]);
    load_transposed<ROW>(&chunk.w[0][16 * step], right);
    add_product(u, rows, right);  // S W^T
    load_transposed<ROW>(&chunk.r[0][16 * step], right);
    add_product(y, rows, right);  // S R'^T
  }
  load_transposed<PADDED>(&chunk.m[0][0], right);
  add_product(y, values, right);  // V^T M^T
  store_values(y, args.y, tokens, first);
  step_state(state, chunk, values, chunk.k, to_operand(u[0], u[1]), chunk.b);
}

__global__ void __launch_bounds__(THREADS, BLOCKS) forward_kernel(const Arguments args) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int own = threadIdx.x / 32 / PARTS;  // the chunk that this warp prepares
  const int thread = threadIdx.x % (PARTS * 32);
  const Work work = find_work<SPAN, THREADS>(args, blockIdx.x);
  if (work.done) return;
  const Tokens tokens = tokens_of(args, work.sequence, work.head);
  int64_t checkpoint = work.sequence.first_checkpoint * args.H + work.head;

  State state;
  load_state(States::before(args), work.state, state);
  fetch<PARTS * 32>(args, tokens, own * TOKENS, thread, shared.raw[own]);
  for (int first = 0; first < tokens.count; first += SPAN) {
    store_checkpoint(args, checkpoint, state);
    checkpoint += args.H;
    copies_done();
    __syncthreads();  // and the last span's readers are done
    fetch_rows<SPAN, THREADS>(args.v, tokens, first, threadIdx.x, shared.v);
    prepare<DECAY, BOUNDED, PARTS>(args, tokens, first + own * TOKENS, shared.raw[own],
                                   shared.chunks[own], shared.partials[own]);
    copies_done();
    __syncthreads();
    fetch<PARTS * 32>(args, tokens, first + SPAN + own * TOKENS, thread, shared.raw[own]);
    for (int chunk = 0; chunk < CHUNKS && first + chunk * TOKENS < tokens.count; ++chunk)
      scan_chunk(args, tokens, first + chunk * TOKENS, shared.chunks[chunk],
                 shared.v[chunk * TOKENS], state);
  }
  copies_done();
  // A place that no span needs is written all the same, so that no output is left undefined.
  if ((tokens.count + SPAN - 1) / SPAN < work.sequence.checkpoints)
    store_checkpoint(args, checkpoint, state);
  store_state(state, States::after(args), work.state);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  return launch<Shared>(forward_kernel, begin_forward(*args, args->S * args->H, BLOCKS));
}
