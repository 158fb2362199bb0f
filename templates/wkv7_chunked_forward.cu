// wkv7 forward on tensor cores: one block per sequence and head. Most of its warps prepare chunks
// of 16 tokens, PARTS of them each, which needs no state, and leave them in SLOTS places; the
// others, each with 16 rows of the state, take it through them: S [value, key] stays in registers,
// in float.
#include <cuda_runtime.h>

#include <type_traits>

//% include "prelude.h"
#include "rwkv_jit/cuda/element.cuh"
//% include "element_types.h"
#include "rwkv_jit/cuda/wkv7_chunk.cuh"
//% include "chunked_types.h"
//% include "wkv7_chunked_state.h"
//% include "cuda_sequences.h"

namespace {

using namespace rwkv_jit;

constexpr bool BOUNDED = {{bounded}};  // no decay is below e^-8
constexpr int PREPARING = WARPS - STATE_WARPS, SLOTS = PREPARING / PARTS;
static_assert(PREPARING == SLOTS * PARTS);
// Numbered barriers: that a slot's chunk is done with, and that it is there. Between the two the
// former is sync_chunk's.
constexpr int EMPTY_BARRIER = PARTS == 1 ? 0 : 1, FULL_BARRIER = EMPTY_BARRIER + SLOTS;
constexpr int SLOT_THREADS = (PARTS + STATE_WARPS) * 32;
static_assert(FULL_BARRIER + SLOTS <= 16);

struct Slot {
  Chunk chunk;
  Raw raw;
  Element v[TOKENS][ROW];
  Partials partials;
};

struct Shared {
  Slot slots[SLOTS];
};

// Prepares the chunks that come to this warp's slot.
__device__ __forceinline__ void prepare_chunks(const Arguments& args, const Tokens& tokens,
                                               Shared& shared) {
  const int slot_index = threadIdx.x / 32 / PARTS, thread = threadIdx.x % (PARTS * 32);
  Slot& slot = shared.slots[slot_index];
  const auto fetch_raw = [&](int first) {
    fetch<PARTS * 32>(args, tokens, first, thread, slot.raw);
  };
  if (slot_index * TOKENS < tokens.count) fetch_raw(slot_index * TOKENS);
  for (int first = slot_index * TOKENS; first < tokens.count; first += SLOTS * TOKENS) {
    copies_done();
    if (first >= SLOTS * TOKENS) wait_at<SLOT_THREADS>(EMPTY_BARRIER + slot_index);
    sync_chunk<PARTS>();  // the tensors are there
    fetch_rows<TOKENS, PARTS * 32>(args.v, tokens, first, thread, slot.v);
    prepare<DECAY, BOUNDED, PARTS, false>(
        args, tokens, first, TokenSums(), threadIdx.x / 32 % PARTS, slot.raw, slot.chunk,
        [&](int part) { return slot.partials[part]; }, [&] { fetch_raw(first + SLOTS * TOKENS); },
        [] {});
    copies_done();
    arrive_at<SLOT_THREADS>(FULL_BARRIER + slot_index);
  }
}

// Y^T for this warp's 16 values of a chunk, and the state after it.
__device__ __forceinline__ void scan_chunk(const Arguments& args, const Tokens& tokens, int first,
                                           const Chunk& chunk, const Element* v, State& state) {
  Accumulator u[2] = {}, y[2] = {};
  OperandA values;
  OperandB right;
  load_transposed<ROW>(v + own_value(), values);
  values = rounded(values);
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

// Takes this warp's rows of the state through all chunks.
__device__ __forceinline__ void scan_chunks(const Arguments& args, const Tokens& tokens,
                                            const Work& work, const Shared& shared) {
  int64_t checkpoint = work.sequence.first_checkpoint * args.H + work.head;
  State state;
  load_state(States::before(args), work.state, state);
  int slot = 0;
  for (int first = 0; first < tokens.count; first += TOKENS) {
    if (first % SPAN == 0) {
      store_checkpoint(args, checkpoint, state);
      checkpoint += args.H;
    }
    wait_at<SLOT_THREADS>(FULL_BARRIER + slot);
    scan_chunk(args, tokens, first, shared.slots[slot].chunk, &shared.slots[slot].v[0][0], state);
    if (first + SLOTS * TOKENS < tokens.count) arrive_at<SLOT_THREADS>(EMPTY_BARRIER + slot);
    slot = slot + 1 == SLOTS ? 0 : slot + 1;
  }
  // A place that no span needs is written all the same, so that no output is left undefined.
  if ((tokens.count + SPAN - 1) / SPAN < work.sequence.checkpoints)
    store_checkpoint(args, checkpoint, state);
  store_state(state, States::after(args), work.state);
}

__global__ void __launch_bounds__(THREADS, BLOCKS) forward_kernel(const Arguments args) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const Work work = find_work<SPAN, THREADS>(args, blockIdx.x);
  if (work.done) return;
  const Tokens tokens = tokens_of(args, work.sequence, work.head);
  if (threadIdx.x < PREPARING * 32) {
    prepare_chunks(args, tokens, shared);
  } else {
    scan_chunks(args, tokens, work, shared);
  }
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t blocks = args->S * args->H;
  return launch<Shared>(forward_kernel, begin_forward(*args, blocks, BLOCKS), blocks);
}
