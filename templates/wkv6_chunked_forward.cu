// wkv6 and wkv5 forward on tensor cores: one block per sequence and head, a span of CHUNKS chunks
// of 16 tokens a time. Its warps prepare the chunks side by side; then each takes its part of the
// state S [value, key], in registers and float, through them, and leaves it, rounded, before each;
// then they work out the outputs of all chunks side by side. Names as in wkv6_chunk.cuh.
#include <cuda_runtime.h>

#include <type_traits>

//% include "prelude.h"
//% include "wkv6_decay.h"
#include "rwkv_jit/cuda/element.cuh"
//% include "element_types.h"
#include "rwkv_jit/cuda/wkv6_chunk.cuh"
//% include "chunked_types.h"
//% include "wkv6_chunked_state.h"
//% include "cuda_sequences.h"

namespace {

struct Shared : HeadTables {
  Chunk chunks[CHUNKS];
  Raw raw[CHUNKS];
  Element v[SPAN][ROW];
  union {
    Partials partials[CHUNKS];  // until the chunks are prepared
    StateRows states[CHUNKS];   // before each chunk
  };
};

// Y of sixteen values of a chunk.
__device__ __forceinline__ void store_outputs(const Arguments& args, const Tokens& tokens,
                                              int first, const Chunk& chunk, const StateRows& state,
                                              const Element (*v)[ROW], int value) {
  Accumulator y[2] = {};
  OperandA left;
  OperandB right;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    load<ROW>(&chunk.r[0][16 * step], left);
    load_transposed<ROW>(&state[value][16 * step], right);
    add_product(y, left, right);
  }
  load<PADDED>(&chunk.m[0][0], left);
  load<ROW>(&v[0][value], right);
  add_product(y, left, right);
  store_tokens(y, args.y, tokens, first, value);
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

  make_tables<DECAY, THREADS>(args, work.head, shared);
  State state;
  load_state(States::before(args), work.state, state);
  fetch<PARTS * 32>(args, tokens, own * TOKENS, thread, shared.raw[own]);
  for (int first = 0; first < tokens.count; first += SPAN) {
    const int own_first = first + own * TOKENS;
    store_checkpoint(args, checkpoint, state);
    checkpoint += args.H;
    copies_done();
    __syncthreads();  // and the last span's readers are done
    fetch_rows<SPAN, THREADS>(args.v, tokens, first, threadIdx.x, shared.v);
    Channels channels[PART_STEPS];
    prepare<DECAY, PARTS>(args, tokens, own_first, shared.raw[own], shared, shared.chunks[own],
                          shared.partials[own], channels);
    copies_done();
    __syncthreads();  // the chunks and v are there
    fetch<PARTS * 32>(args, tokens, own_first + SPAN, thread, shared.raw[own]);
#pragma unroll 2
    for (int at = 0; at < CHUNKS; ++at) {
      store_state_rows(state, shared.states[at]);
      step_state(state, shared.chunks[at], &shared.v[at * TOKENS], shared.chunks[at].k);
    }
    __syncthreads();  // the states are there
#pragma unroll
    for (int step = 0; step < PART_STEPS; ++step)
      store_outputs(args, tokens, own_first, shared.chunks[own], shared.states[own],
                    &shared.v[own * TOKENS], own_channel() + 16 * step);
  }
  copies_done();
  // A place that no span needs is written all the same, so that no output is left undefined.
  if ((tokens.count + SPAN - 1) / SPAN < work.sequence.checkpoints)
    store_checkpoint(args, checkpoint, state);
  store_state(state, States::after(args), work.state);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t blocks = args->S * args->H;
  return launch<Shared>(forward_kernel, begin_forward(*args, blocks, BLOCKS), blocks);
}
