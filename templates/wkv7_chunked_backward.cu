// wkv7 backward on tensor cores: blocks take turns at sequences and heads, in spans of CHUNKS
// chunks of 16 tokens from the last to the first. In a span a block's warps prepare the chunks as
// in the forward. Then, from the last chunk to the first, they take the state, each 16 rows of it,
// from the span's checkpoint to the chunk, and D = dL/dS back through it
//   E = D B^^T   dV = K'' D^T + M^T dY   dX = T^T (A_qb^T dY + E^T)
//   D <- D diag(P_L) + E W + dY^T R'
// and work out the chunk's gradients (each those of 16 channels; names as in wkv7_chunk.cuh):
//   U = W S^T + G V   dA_ab = tril(dX U^T, -1)  dA_ak = tril(dX V^T, -1)  dA_qb = tril(dY U^T)
//   dA_qk = tril(dY V^T)   dr = P (dY S) + p (dA_qb b~ + dA_qk k~), and so on,
// where p and ~ are the triangles' factors. The gradient of log d at a token sums what crosses it.
// In the triangles that is a difference of sums of the very products that went into them, so that
// what does not cross cancels.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <type_traits>

//% include "prelude.h"
#include "rwkv_jit/cuda/blocks.h"
#include "rwkv_jit/cuda/element.cuh"
//% include "element_types.h"
#include "rwkv_jit/cuda/wkv7_chunk.cuh"
//% include "chunked_types.h"
//% include "wkv7_chunked_state.h"
//% include "wkv7_chunked_scans.h"
//% include "wkv7_chunked_turns.h"

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
  store_matrix(sum, triangle_of(chunk, which));
}

// Asks for the tensors of chunk `at` of the span at `first`.
__device__ __forceinline__ void fetch_chunk(const Arguments& args, const Tokens& tokens, int first,
                                            Shared& shared, int at) {
  const int token = first + at * TOKENS;
  fetch<THREADS>(args, tokens, token, threadIdx.x, shared.raw[at]);
  fetch_rows<TOKENS, THREADS>(args.v, tokens, token, threadIdx.x, &shared.v[at * TOKENS]);
  fetch_rows<TOKENS, THREADS>(args.dy, tokens, token, threadIdx.x, &shared.dy[at * TOKENS]);
}

// sum += triangle^T right.
__device__ __forceinline__ void add_columns(Accumulator (&sum)[2], const Element* triangle,
                                            const OperandB& right) {
  OperandA left;
  load_transposed<PADDED>(triangle, left);
  add_product(sum, left, right);
}
// sum += triangle right.
__device__ __forceinline__ void add_rows(Accumulator (&sum)[2], const Element* triangle,
                                         const OperandB& right) {
  OperandA left;
  load<PADDED>(triangle, left);
  add_product(sum, left, right);
}

// Gradients of r, w, k, a and b for sixteen channels of chunk `at` of a span, whose first token is
// `first`, by this warp. As soon as the block is done with the chunk's tensors, those of the span
// at `before`, if any, are asked for.
__device__ __forceinline__ void channel_gradients(const Arguments& args, const Tokens& tokens,
                                                  int first, int before, Shared& shared, int at,
                                                  int key) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  Chunk& chunk = shared.chunks[at];
  const Raw& raw = shared.raw[at];
  const bool valid[2] = {first + g < tokens.count, first + g + 8 < tokens.count};
  const int64_t place = tokens.at(first + g) + key + 2 * q;
  const int stride = tokens.stride;
  const TokenSums sums;
  // What is in shared memory is read again where it is needed again: registers are short.
  const auto rows_of = [key](const Element(&tensor)[TOKENS][ROW]) {
    OperandA rows;
    load<ROW>(&tensor[0][key], rows);
    return rows;
  };
  float log2_d[8];
  load_log2_decays<DECAY, BOUNDED>(args, tokens, first, key, raw.w, log2_d);
  const Decays decays = decays_of<DECAY, BOUNDED>(log2_d);

  // Against the states. What crosses a token: from states before it to rows at or after it (a:
  // after it alone), from columns before it to the state after the chunk, and from state to state.
  Accumulator dr[2] = {}, da[2] = {}, dk[2] = {}, db[2] = {}, dw[2] = {}, factors[2];
  {
#pragma unroll(N > 64 ? STEPS : 2)
    for (int step = 0; step < STEPS; ++step) {
      OperandA left;
      OperandB right;
      load<ROW>(&state_of(shared, at)[16 * step][key], right);
      load<ROW>(&shared.dy[at * TOKENS][16 * step], left);
      add_product(dr, rounded(left), right);
      load_transposed<PADDED>(&dx_of(chunk)[16 * step][0], left);
      add_product(da, left, right);
    }
    exp2_of_sums(sums.sum_up_to(), decays.log_d, factors);
    scale(dr, factors);
    add_overlap(rows_of(raw.r), dr, dw);
    exp2_of_sums(sums.sum_before(), decays.log_d, factors);
    scale(da, factors);
    Accumulator terms[2] = {};
    add(dw, terms);
    add_overlap(rows_of(raw.a), da, terms);
    add_product(dw, sums.sum_after(), to_second(to_operand(terms[0], terms[1])));
  }
  {
    Accumulator overlap[2] = {};  // S0^T D
#pragma unroll(N > 64 ? STEPS : 1)
    for (int step = 0; step < STEPS; ++step) {
      OperandA left;
      OperandB right;
      load<ROW>(&shared.d[16 * step][key], right);
      load<ROW>(&shared.v[at * TOKENS][16 * step], left);
      add_product(dk, rounded(left), right);
      load_transposed<PADDED>(&u_of(chunk)[16 * step][0], left);
      add_product(db, left, right);
      load_transposed<ROW>(&state_of(shared, at)[16 * step][key], left);
      add_product(overlap, left, right);
    }
    exp2_of_sums(sums.sum_after(), decays.log_d, factors);
    scale(dk, factors);
    scale(db, factors);
    Accumulator terms[2] = {};
    add_overlap(rows_of(raw.k), dk, terms);
    add_overlap(rows_of(raw.b), db, terms);
    add_product(dw, sums.sum_before(), to_second(to_operand(terms[0], terms[1])));
    float through[2][2];
    diagonal(overlap, through);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float2 total = *reinterpret_cast<const float2*>(&chunk.total[key + 8 * tile + 2 * q]);
#pragma unroll
      for (int x = 0; x < 4; ++x) dw[tile][x] += (x % 2 ? total.y : total.x) * through[tile][x % 2];
    }
  }

  // In the triangles. What crosses a token: rows at or after it (a: after it alone) from columns
  // before it. What does not cross cancels, as these are the very products.
  Accumulator to_middle[2], crossing[2] = {}, own[2] = {};
  OperandA r, k, a, b;
  {
    exp2_of_sums(sums.from_middle(), decays.bounded, factors, to_middle);
    const OperandA columns = to_operand<stored>(to_middle[0], to_middle[1]);
    k = times(rows_of(raw.k), columns), b = times(rows_of(raw.b), columns);
    const OperandB second_k = to_second(k), second_b = to_second(b);
    {
      Accumulator sum[2] = {};
      r = times(rows_of(raw.r), to_operand<stored>(factors[0], factors[1]));
      add_rows(sum, triangle_of(chunk, QB), second_b);
      add_rows(sum, triangle_of(chunk, QK), second_k);
      add_overlap(r, sum, crossing);
      scale_and_add(sum, factors, dr);
      store_pairs(sum, args.dr, place, stride, valid);
    }
    {
      Accumulator sum[2] = {};
      exp2_of_sums(sums.from_middle_before(), decays.bounded, factors);
      a = times(rows_of(raw.a), to_operand<stored>(factors[0], factors[1]));
      add_rows(sum, triangle_of(chunk, AB), second_b);
      add_rows(sum, triangle_of(chunk, AK), second_k);
      add_overlap(a, sum, own);
      scale_and_add(sum, factors, da);
      store_pairs(sum, args.da, place, stride, valid);
      __syncthreads();  // the readers of the chunk's tensors and of the states are done
      if (before >= 0) fetch_chunk(args, tokens, before, shared, at);
    }
  }
  const OperandB second_r = to_second(r), second_a = to_second(a);
  const auto store_column = [&](Triangle of_r, Triangle of_a, const OperandA& columns,
                                const Accumulator(&against_state)[2], void* to) {
    Accumulator sum[2] = {};
    add_columns(sum, triangle_of(chunk, of_r), second_r);
    add_columns(sum, triangle_of(chunk, of_a), second_a);
    add_overlap<true>(columns, sum, crossing);
    scale_and_add(sum, to_middle, against_state);
    store_pairs(sum, to, place, stride, valid);
  };
  store_column(QK, AK, k, dk, args.dk);
  store_column(QB, AB, b, db, args.db);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      float upper = crossing[tile][odd] + own[tile][odd],
            lower = crossing[tile][2 + odd] + own[tile][2 + odd];
      running_sum_back(upper, lower);
      crossing[tile][odd] = upper - own[tile][odd];
      crossing[tile][2 + odd] = lower - own[tile][2 + odd];
    }
  Accumulator log_d[2] = {};
  add_product(log_d, sums.same(), decays.log_d);
#pragma unroll
  for (int x = 0; x < 8; ++x) {
    const float log = log_d[x / 4][x % 4];
    // The triangles have the bounded decay; what crosses this token has its own in truth.
    const float ratio = BOUNDED ? 1.0f : exp2_fast(fminf(log - STRONGEST, 0.0f));
    float& sum = dw[x / 4][x % 4];
    sum = fmaf(crossing[x / 4][x % 4], ratio, sum) * decay_slope<DECAY>(log);
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
  scan_backward<false>(args, tokens, first, shared, at, d, dx);
  __syncthreads();  // W, R', K'' and B^ are done with
  store_matrix(u, u_of(chunk)[own_value()]);
  store_matrix(dx, dx_of(chunk)[own_value()]);
  __syncthreads();  // U, dX, the state and D are there
  if (warp < TRIANGLES) triangle_gradient(shared, at, warp);
  __syncthreads();
  channel_gradients(args, tokens, first, before, shared, at, warp * 16);
}

__global__ void __launch_bounds__(THREADS, BLOCKS)
    backward_kernel(const Arguments args, const Turns turns) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int own = threadIdx.x / 32 / PARTS;  // the chunk that this warp prepares
  for (int ticket; (ticket = take_turn(args, shared)) < turns.count;) {
    const int index = ticket % turns.heads, turn = ticket / turns.heads;
    const Sequence sequence = find_sequence(args, index / args.H, SPAN);
    const Tokens tokens = tokens_of(args, sequence, index % args.H);
    const int spans = (tokens.count + SPAN - 1) / SPAN - turn * turns.spans;
    if (spans <= 0 && turn > 0) continue;
    State d;
    if (spans <= 0) load_state(args.dfinal_state, index, d);
    // Not in a register, which are short.
    if (threadIdx.x == 0) shared.begin = max(spans - turns.spans, 0) * SPAN;
    __syncthreads();
    int first = (spans - 1) * SPAN;
    int checkpoint =
        static_cast<int>((sequence.first_checkpoint + spans - 1) * args.H + index % args.H);
    for (int at = 0; at < CHUNKS && spans > 0; ++at) fetch_chunk(args, tokens, first, shared, at);
    for (bool begun = false; first >= shared.begin; first -= SPAN, begun = true) {
      const int chunks = min(CHUNKS, (tokens.count - first + TOKENS - 1) / TOKENS);
      const int before = first > shared.begin ? first - SPAN : -1;
      copies_done();
      __syncthreads();  // the tensors are there
      prefetch_checkpoint(args, checkpoint);
      if (before >= 0) prefetch_span(args, tokens, before);
      prepare<DECAY, BOUNDED, PARTS>(args, tokens, first + own * TOKENS, shared.raw[own],
                                     shared.chunks[own], shared.partials[own], [] {});
      __syncthreads();  // the chunks are there
      if (chunks > 1) scan_forward_to<true>(args, checkpoint, shared);
      if (!begun) take_over(args, shared.ticket % turns.heads, shared.ticket / turns.heads, d);
      if (first == shared.begin && first > 0)
        hand_over(args, shared.ticket % turns.heads, tokens, shared, chunks, d);
      for (int at = chunks - 1; at >= 0; --at) {
        if (at == 0 && (STATES == 1 || chunks == 1))
          scan_forward_to<false>(args, checkpoint, shared);
        chunk_gradients(args, tokens, first + at * TOKENS, before, shared, at, d);
      }
      // This span may have fewer chunks than the one before it.
      for (int at = chunks; at < CHUNKS && before >= 0; ++at)
        fetch_chunk(args, tokens, before, shared, at);
      checkpoint -= static_cast<int>(args.H);
    }
    if (shared.begin == 0) store_state(d, args.dinitial_state, shared.ticket % turns.heads);
  }
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t heads = args->S * args->H, spans = (args->T + SPAN - 1) / SPAN;
  if (heads == 0) return cudaSuccess;
  // Where heads are many, sixteen turns for each block, so that all end at about the same time.
  // Where they are few, a turn a span: blocks share a sequence, and D goes from one to the next.
  const int64_t at_once = std::max<int64_t>(blocks_at_once(BLOCKS), 1);
  int64_t each = heads < at_once ? spans : (16 * at_once + heads - 1) / heads;
  if (heads > {{most_shared}}) each = 1;  // there is no place for more to hand over
  const int64_t turn_spans = std::max<int64_t>((spans + each - 1) / std::max<int64_t>(each, 1), 1);
  const int64_t count = heads * std::max<int64_t>((spans + turn_spans - 1) / turn_spans, 1);
  const auto stream = static_cast<cudaStream_t>(args->stream);
  const cudaError_t error = cudaMemsetAsync(args->turns, 0, (heads + 1) * sizeof(int), stream);
  if (error != cudaSuccess) return error;
  return launch<Shared>(
      backward_kernel, *args, std::min(count, at_once),
      Turns{static_cast<int>(turn_spans), static_cast<int>(count), static_cast<int>(heads)});
}
