// wkv7 backward on tensor cores: one block per sequence and head, spans of CHUNKS chunks of 16
// tokens from the last to the first. In a span: its warps prepare the chunks as in the forward;
// then STATE_WARPS of them, each with 16 rows, take the state from the span's checkpoint through
// the chunks, keeping the state before each, and as many, where there are others, D = dL/dS back
//   E = D B^^T   dV = K'' D^T + M^T dY   dX = T^T (A_qb^T dY + E^T)
//   D <- D diag(P_L) + E W + dY^T R'
// and all warps work out those chunks' gradients (each 16 channels of one; names as in
// wkv7_chunk.cuh):
//   U = W S^T + G V   dA_ab = tril(dX U^T, -1)  dA_ak = tril(dX V^T, -1)  dA_qb = tril(dY U^T)
//   dA_qk = tril(dY V^T)   dr = P (dY S) + p (dA_qb b~ + dA_qk k~), and so on,
// where p and ~ are the triangles' factors. The gradient of log d at a token sums what crosses it.
// In the triangles that is a difference of sums of the very products that went into them, so that
// what does not cross cancels.
#include <cuda_runtime.h>

#include <algorithm>
#include <initializer_list>
#include <type_traits>

//% include "prelude.h"
#include "rwkv_jit/cuda/blocks.h"
#include "rwkv_jit/cuda/element.cuh"
//% include "element_types.h"
#include "rwkv_jit/cuda/wkv7_chunk_gradient.cuh"
//% include "chunked_types.h"
//% include "wkv7_chunked_state.h"
//% include "wkv7_chunked_scans.h"

namespace {

using namespace rwkv_jit;

constexpr bool BOUNDED = {{bounded}};  // no decay is below e^-8

// The gradient of one of a chunk's triangles, by this warp.
__device__ __forceinline__ void triangle_gradient(Shared& shared, int at, int which) {
  Chunk& chunk = shared.chunks[at];
  Accumulator sum[2] = {};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    OperandA left;
    OperandB right;
    if (which == AB || which == AK) {
      load_transposed<PADDED>(&dx_of(chunk)[16 * step][0], left);
    } else {
      load<ROW>(&shared.dy[at * TOKENS][16 * step], left);
      left = rounded(left);
    }
    if (which == AB || which == QB) {
      load<PADDED>(&u_of(chunk)[16 * step][0], right);
    } else {
      load_transposed<ROW>(&shared.v[at * TOKENS][16 * step], right);
      right = rounded(right);
    }
    add_product(sum, left, right);
  }
  if (which == AB || which == AK) {
    lower_triangle<true>(sum);
  } else {
    lower_triangle<false>(sum);
  }
  store_tile<PADDED>(sum[0], triangle_of(chunk, which));
  store_tile<PADDED>(sum[1], triangle_of(chunk, which) + 8);
}

// Asks for the tensors of chunk `at` of the span at `first`.
__device__ __forceinline__ void fetch_chunk(const Arguments& args, const Tokens& tokens, int first,
                                            Shared& shared, int at) {
  const int token = first + at * TOKENS;
  fetch<THREADS>(args, tokens, token, threadIdx.x, shared.raw[at]);
  fetch_rows<TOKENS, THREADS>(args.v, tokens, token, threadIdx.x, &shared.v[at * TOKENS]);
  fetch_rows<TOKENS, THREADS>(args.dy, tokens, token, threadIdx.x, &shared.dy[at * TOKENS]);
}

// Gradients of r, w, k, a and b for sixteen channels of chunk `at` of a span, whose first token is
// `first`, by this warp. As soon as the block is done with the chunk's tensors, those of the span at
// `before`, if any, are asked for.
__device__ __forceinline__ void channel_gradients(const Arguments& args, const Tokens& tokens,
                                                  int first, int before, Shared& shared, int at,
                                                  int key) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  Chunk& chunk = shared.chunks[at];
  Loaded loaded;
  loaded.load_from(shared.raw[at], key);
  const bool valid[2] = {first + g < tokens.count, first + g + 8 < tokens.count};
  const int64_t place = tokens.at(first + g) + key + 2 * q;
  const int stride = tokens.stride;
  Accumulator log_d[2], bounded[2];
  loaded.log2_decays<DECAY, BOUNDED>(
      is_wide(args.w_dtype) ? static_cast<const float*>(args.w) + place : nullptr, stride, valid,
      log_d);
#pragma unroll
  for (int x = 0; x < 8; ++x) bounded[x / 4][x % 4] = log_d[x / 4][x % 4];
  const Decays decays = decays_of<DECAY, BOUNDED>(bounded);

  // In the triangles.
  Accumulator dr[2] = {}, da[2] = {}, dk[2] = {}, db[2] = {}, dw[2] = {};
  {
    Accumulator from_middle[2], before[2], to_middle[2];
    exp2_of_sums(sums_of(FROM_MIDDLE), decays.bounded, from_middle, to_middle);
    exp2_of_sums(sums_of(FROM_MIDDLE_BEFORE), decays.bounded, before);
    const OperandA r = scaled(loaded.r, from_middle), a = scaled(loaded.a, before),
                   k = scaled(loaded.k, to_middle), b = scaled(loaded.b, to_middle);
    OperandA left;
    OperandB right = to_second(b), other = to_second(k);
    load<PADDED>(triangle_of(chunk, QB), left);
    add_product(dr, left, right);
    load<PADDED>(triangle_of(chunk, AB), left);
    add_product(da, left, right);
    load<PADDED>(triangle_of(chunk, QK), left);
    add_product(dr, left, other);
    load<PADDED>(triangle_of(chunk, AK), left);
    add_product(da, left, other);
    right = to_second(r), other = to_second(a);
    load_transposed<PADDED>(triangle_of(chunk, QB), left);
    add_product(db, left, right);
    load_transposed<PADDED>(triangle_of(chunk, QK), left);
    add_product(dk, left, right);
    load_transposed<PADDED>(triangle_of(chunk, AB), left);
    add_product(db, left, other);
    load_transposed<PADDED>(triangle_of(chunk, AK), left);
    add_product(dk, left, other);
    // What crosses a token: rows at or after it (a: after it alone) from columns before it. What
    // does not cross cancels, as these are the very products.
    Accumulator own[2] = {};
    add_overlap(a, da, own);
    add_overlap(r, dr, dw);
    add_overlap<true>(k, dk, dw);
    add_overlap<true>(b, db, dw);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd) {
        float upper = dw[tile][odd] + own[tile][odd],
              lower = dw[tile][2 + odd] + own[tile][2 + odd];
        running_sum_back(upper, lower);
        dw[tile][odd] = upper - own[tile][odd];
        dw[tile][2 + odd] = lower - own[tile][2 + odd];
      }
    // The triangles have the bounded decay; what crosses this token has its own in truth.
    if constexpr (!BOUNDED) {
#pragma unroll
      for (int x = 0; x < 8; ++x)
        dw[x / 4][x % 4] *= exp2_fast(log_d[x / 4][x % 4] - fmaxf(log_d[x / 4][x % 4], STRONGEST));
    }
    scale(dr, from_middle);
    scale(da, before);
    scale(dk, to_middle);
    scale(db, to_middle);
  }
  if constexpr (IS_FP32) {
    __syncwarp();  // so that they are read again, and have no registers till here
    loaded.load_from(shared.raw[at], key);
  }
  // Against the states. What crosses a token: from states before it to rows at or after it (a:
  // after it alone), from columns before it to the state after the chunk, and from state to state.
  Accumulator factors[2];
  {
    Accumulator dr_state[2] = {}, da_state[2] = {}, terms[2] = {};
#pragma unroll 2
    for (int step = 0; step < STEPS; ++step) {
      OperandA left;
      OperandB right;
      load<ROW>(&shared.state[16 * step][key], right);
      load<ROW>(&shared.dy[at * TOKENS][16 * step], left);
      add_product(dr_state, rounded(left), right);
      load_transposed<PADDED>(&dx_of(chunk)[16 * step][0], left);
      add_product(da_state, left, right);
    }
    exp2_of_sums(sums_of(UP_TO), decays.log_d, factors);
    scale(dr_state, factors);
    add_overlap(loaded.r, dr_state, terms);
    add(terms, dw);
    add(dr_state, dr);
    store_pairs(dr, args.dr, place, stride, valid);
    exp2_of_sums(sums_of(BEFORE), decays.log_d, factors);
    scale(da_state, factors);
    add_overlap(loaded.a, da_state, terms);
    add_product(dw, sums_of(AFTER), split(terms));
    add(da_state, da);
    store_pairs(da, args.da, place, stride, valid);
  }
  Accumulator overlap[2] = {};  // S0^T D
  {
    Accumulator dk_state[2] = {}, db_state[2] = {}, terms[2] = {};
#pragma unroll 2
    for (int step = 0; step < STEPS; ++step) {
      OperandA left;
      OperandB right;
      load<ROW>(&shared.d[16 * step][key], right);
      load<ROW>(&shared.v[at * TOKENS][16 * step], left);
      add_product(dk_state, rounded(left), right);
      load_transposed<PADDED>(&u_of(chunk)[16 * step][0], left);
      add_product(db_state, left, right);
      load_transposed<ROW>(&shared.state[16 * step][key], left);
      add_product(overlap, left, right);
    }
    __syncthreads();  // the readers of the chunk's tensors and of the states are done
    if (before >= 0) fetch_chunk(args, tokens, before, shared, at);
    exp2_of_sums(sums_of(AFTER), decays.log_d, factors);
    scale(dk_state, factors);
    scale(db_state, factors);
    add_overlap(loaded.k, dk_state, terms);
    add_overlap(loaded.b, db_state, terms);
    add_product(dw, sums_of(BEFORE), split(terms));
    add(dk_state, dk);
    store_pairs(dk, args.dk, place, stride, valid);
    add(db_state, db);
    store_pairs(db, args.db, place, stride, valid);
  }
  float through[2][2];
  diagonal(overlap, through);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const float2 total =
        *reinterpret_cast<const float2*>(&chunk.total[key + 8 * tile + 2 * q]);
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      const float crossed = dw[tile][x] + (x % 2 ? total.y : total.x) * through[tile][x % 2];
      dw[tile][x] = crossed * decay_slope<DECAY>(log_d[tile][x]);
    }
  }
  if (is_wide(args.dw_dtype)) {
    store_wide_pairs(dw, args.dw, place, stride, valid);
  } else {
    store_pairs(dw, args.dw, place, stride, valid);
  }
}

// Asks the second-level cache for the tensors of a span.
__device__ __forceinline__ void prefetch_span(const Arguments& args, const Tokens& tokens,
                                              int first) {
  constexpr int LINE = 128 / sizeof(Element), LINES = N / LINE;  // of a row
  const auto prefetch_line = [&](int at) {
    const int64_t line = tokens.at(first + at / LINES) + at % LINES * LINE;
    for (const void* tensor : {args.r, args.k, args.v, args.a, args.b, args.dy})
      prefetch(static_cast<const Element*>(tensor) + line);
    if (is_wide(args.w_dtype)) {
      prefetch(static_cast<const float*>(args.w) + line);
      prefetch(static_cast<const float*>(args.w) + line + 32);
    } else {
      prefetch(static_cast<const Element*>(args.w) + line);
    }
  };
  static_assert(SPAN * LINES <= THREADS);
  if (threadIdx.x < SPAN * LINES) prefetch_line(threadIdx.x);
}

// The gradients of a chunk, and D back through it. `first` and `before`: see channel_gradients.
__device__ __forceinline__ void chunk_gradients(const Arguments& args, const Tokens& tokens,
                                                int first, int before, Shared& shared, int at,
                                                State& d) {
  const int warp = threadIdx.x / 32;
  Chunk& chunk = shared.chunks[at];
  Accumulator u[2] = {}, dx[2] = {};
  make_u(shared, at, u);
  scan_backward(args, tokens, first, shared, at, d, dx);
  __syncthreads();  // W, R', K'' and B^ are done with
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    store_tile<PADDED>(u[tile], &u_of(chunk)[own_value()][8 * tile]);
    store_tile<PADDED>(dx[tile], &dx_of(chunk)[own_value()][8 * tile]);
  }
  __syncthreads();  // U, dX, the state and D are there
  if (warp < TRIANGLES) triangle_gradient(shared, at, warp);
  __syncthreads();
  channel_gradients(args, tokens, first, before, shared, at, warp * 16);
}

// D of a sequence and head as the lanes hold it, between blocks that share the sequence.
__device__ __forceinline__ float4* handed_over(const Arguments& args, int64_t index) {
  return reinterpret_cast<float4*>(static_cast<float*>(args.handed_over) + index * N * N) +
         own_value() / 16 * STEPS * 2 * 32 + threadIdx.x % 32;
}

// A turn is so many spans of a sequence and head. The first one's are the last of the sequence;
// each begins with D as the turn before left it, which is not to be waited for if it is the same
// block's. Turns are given out in their order, so that one that is waited for is under way.
struct Turns {
  int spans, count;  // of a turn; of all
};
__device__ __forceinline__ int* turns_done(const Arguments& args, int64_t index) {
  return static_cast<int*>(args.turns) + 1 + index;
}
__device__ __forceinline__ int take_turn(const Arguments& args, Shared& shared) {
  if (threadIdx.x == 0) shared.ticket = atomicAdd(static_cast<int*>(args.turns), 1);
  __syncthreads();
  const int ticket = shared.ticket;
  __syncthreads();  // every thread has read it
  return ticket;
}
__device__ __forceinline__ void take_over(const Arguments& args, int64_t index, int turn,
                                          State& d) {
  if (turn == 0) {
    load_state(args.dfinal_state, index, d);
    return;
  }
  if (threadIdx.x == 0)
    while (atomicAdd(turns_done(args, index), 0) < turn) __nanosleep(100);
  __syncthreads();
  __threadfence();
  const float4* from = handed_over(args, index);
#pragma unroll
  for (int tile = 0; tile < 2 * STEPS; ++tile)
    get(__ldcg(from + tile * 32), d[tile / 2][tile % 2]);
}
__device__ __forceinline__ void hand_over(const Arguments& args, int64_t index, const State& d) {
  float4* to = handed_over(args, index);
#pragma unroll
  for (int tile = 0; tile < 2 * STEPS; ++tile) put(d[tile / 2][tile % 2], to[tile * 32]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(turns_done(args, index), 1);
}

__global__ void __launch_bounds__(THREADS, BLOCKS) backward_kernel(const Arguments args,
                                                                   const Turns turns) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int own = threadIdx.x / 32 / PARTS;  // the chunk that this warp prepares
  const int heads = static_cast<int>(args.S * args.H);
  for (int ticket; (ticket = take_turn(args, shared)) < turns.count;) {
    const int index = ticket % heads, turn = ticket / heads;
    const int64_t head = index % args.H;
    const Sequence sequence = find_sequence(args, index / args.H, SPAN);
    const Tokens tokens = tokens_of(args, sequence, head);
    const int spans = (tokens.count + SPAN - 1) / SPAN - turn * turns.spans;
    if (spans <= 0 && turn > 0) continue;
    const int begin = max(spans - turns.spans, 0) * SPAN;
    for (int at = 0; at < CHUNKS && spans > 0; ++at)
      fetch_chunk(args, tokens, (spans - 1) * SPAN, shared, at);
    State d;
    if (spans <= 0) take_over(args, index, turn, d);
    for (int first = (spans - 1) * SPAN; first >= begin; first -= SPAN) {
      const int64_t checkpoint = (sequence.first_checkpoint + first / SPAN) * args.H + head;
      const int chunks = min(CHUNKS, (tokens.count - first + TOKENS - 1) / TOKENS);
      const int before = first > begin ? first - SPAN : -1;
      copies_done();
      __syncthreads();  // the tensors are there
      prefetch_checkpoint(args, checkpoint);
      if (before >= 0) prefetch_span(args, tokens, before);
      prepare<DECAY, BOUNDED, PARTS>(args, tokens, first + own * TOKENS, shared.raw[own],
                                     shared.chunks[own], shared.partials[own], [] {});
      __syncthreads();  // the chunks are there
      scan_forward_to(args, checkpoint, shared, chunks - 1);
      if (first == (spans - 1) * SPAN) take_over(args, index, turn, d);
      if (first == begin && begin > 0) {  // at once, as another block may wait for it
        State ahead;
#pragma unroll
        for (int step = 0; step < STEPS; ++step)
#pragma unroll
          for (int at = 0; at < 8; ++at) ahead[step][at / 4][at % 4] = d[step][at / 4][at % 4];
        for (int at = chunks - 1; at >= 0; --at) pass_back(shared, at, ahead);
        hand_over(args, index, ahead);
      }
      for (int at = chunks - 1; at >= 0; --at) {
        if (at < chunks - 1) scan_forward_to(args, checkpoint, shared, at);
        chunk_gradients(args, tokens, first + at * TOKENS, before, shared, at, d);
      }
      // This span may have fewer chunks than the one before it.
      for (int at = chunks; at < CHUNKS && before >= 0; ++at)
        fetch_chunk(args, tokens, before, shared, at);
    }
    if (begin == 0) store_state(d, args.dinitial_state, index);
  }
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t heads = args->S * args->H, spans = (args->T + SPAN - 1) / SPAN;
  if (heads == 0) return cudaSuccess;
  // Where heads are many, eight turns for each block, so that all end at about the same time.
  // Where they are few, a turn a span: blocks share a sequence, and D goes from one to the next.
  const int64_t at_once = std::max<int64_t>(blocks_at_once(BLOCKS), 1);
  int64_t each = heads < at_once ? spans : (8 * at_once + heads - 1) / heads;
  if (heads > {{most_shared}}) each = 1;  // there is no place for more to hand over
  const int64_t turn_spans = std::max<int64_t>((spans + each - 1) / std::max<int64_t>(each, 1), 1);
  const int64_t count = heads * std::max<int64_t>((spans + turn_spans - 1) / turn_spans, 1);
  const auto stream = static_cast<cudaStream_t>(args->stream);
  const cudaError_t error =
      cudaMemsetAsync(args->turns, 0, (heads + 1) * sizeof(int), stream);
  if (error != cudaSuccess) return error;
  return launch<Shared>(backward_kernel, *args, std::min(count, at_once),
                        Turns{static_cast<int>(turn_spans), static_cast<int>(count)});
}
