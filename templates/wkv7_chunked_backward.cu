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
  const Scanned& scanned = shared.work.scanned[at % SCANNED];
  Accumulator sum[2] = {};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    OperandA left;
    OperandB right;
    if (which == AB || which == AK) {
      load_transposed<PADDED>(&scanned.dx[16 * step][0], left);
    } else {
      load<ROW>(&shared.dy[at * TOKENS][16 * step], left);
      left = rounded(left);
    }
    if (which == AB || which == QB) {
      load<PADDED>(&scanned.u[16 * step][0], right);
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
  store_tile<PADDED>(sum[0], triangle_of(shared.chunks[at], which));
  store_tile<PADDED>(sum[1], triangle_of(shared.chunks[at], which) + 8);
}

// Waits for the group of STATE_WARPS warps.
__device__ __forceinline__ void sync_group() {
  wait_at<STATE_WARPS * 32>(GROUP_BARRIER + threadIdx.x / 32 / STATE_WARPS);
}

// Asks a group for chunk `at` of the span at `first`: what it is prepared from and v, dy, or both.
__device__ __forceinline__ void fetch_inputs(const Arguments& args, const Tokens& tokens, int first,
                                             Shared& shared, int at) {
  constexpr int GROUP = STATE_WARPS * 32;
  const int thread = threadIdx.x % GROUP, token = first + at * TOKENS;
  fetch<GROUP>(args, tokens, token, thread, shared.raw[at]);
  fetch_rows<TOKENS, GROUP>(args.v, tokens, token, thread, &shared.v[at * TOKENS]);
}
__device__ __forceinline__ void fetch_dy(const Arguments& args, const Tokens& tokens, int first,
                                         Shared& shared, int at) {
  constexpr int GROUP = STATE_WARPS * 32;
  fetch_rows<TOKENS, GROUP>(args.dy, tokens, first + at * TOKENS, threadIdx.x % GROUP,
                            &shared.dy[at * TOKENS]);
}
__device__ __forceinline__ void fetch_chunk(const Arguments& args, const Tokens& tokens, int first,
                                            Shared& shared, int at) {
  fetch_inputs(args, tokens, first, shared, at);
  fetch_dy(args, tokens, first, shared, at);
}

// Gradients of r, w, k, a and b for sixteen channels of chunk `at` of a span, by this warp. As soon
// as its group is done with the chunk's tensors, those of the span before are asked for.
__device__ __forceinline__ void channel_gradients(const Arguments& args, const Tokens& tokens,
                                                  int span, Shared& shared, int at, int key) {
  const int first = span + at * TOKENS;
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const Scanned& scanned = shared.work.scanned[at % SCANNED];
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
    load<PADDED>(triangle_of(shared.chunks[at], QB), left);
    add_product(dr, left, right);
    load<PADDED>(triangle_of(shared.chunks[at], AB), left);
    add_product(da, left, right);
    load<PADDED>(triangle_of(shared.chunks[at], QK), left);
    add_product(dr, left, other);
    load<PADDED>(triangle_of(shared.chunks[at], AK), left);
    add_product(da, left, other);
    right = to_second(r), other = to_second(a);
    load_transposed<PADDED>(triangle_of(shared.chunks[at], QB), left);
    add_product(db, left, right);
    load_transposed<PADDED>(triangle_of(shared.chunks[at], QK), left);
    add_product(dk, left, right);
    load_transposed<PADDED>(triangle_of(shared.chunks[at], AB), left);
    add_product(db, left, other);
    load_transposed<PADDED>(triangle_of(shared.chunks[at], AK), left);
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
      load<ROW>(&shared.work.state[at][16 * step][key], right);
      load<ROW>(&shared.dy[at * TOKENS][16 * step], left);
      add_product(dr_state, rounded(left), right);
      load_transposed<PADDED>(&scanned.dx[16 * step][0], left);
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
      load<ROW>(&scanned.d[16 * step][key], right);
      load<ROW>(&shared.v[at * TOKENS][16 * step], left);
      add_product(dk_state, rounded(left), right);
      load_transposed<PADDED>(&scanned.u[16 * step][0], left);
      add_product(db_state, left, right);
      load_transposed<ROW>(&shared.work.state[at][16 * step][key], left);
      add_product(overlap, left, right);
    }
    sync_group();  // the readers of the chunk's tensors and of what was scanned are done
    if (span > 0) fetch_chunk(args, tokens, span - SPAN, shared, at);
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
        *reinterpret_cast<const float2*>(&shared.chunks[at].total[key + 8 * tile + 2 * q]);
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

// Takes D alone through the chunks of a span, and asks for the span before it.
__device__ __forceinline__ void pass_span(const Arguments& args, const Tokens& tokens, int first,
                                          Shared& shared, int chunks, State& d) {
  const int group = threadIdx.x / 32 / STATE_WARPS;
  for (int at = group; at < CHUNKS; at += GROUPS)
    fetch_inputs(args, tokens, first - SPAN, shared, at);
  for (int at = CHUNKS - 1; at >= 0 && group == 0; --at) {
    if (at < chunks) scan_backward<false>(shared, at, d);
    sync_group();  // its readers are done
    fetch_dy(args, tokens, first - SPAN, shared, at);
  }
}

// The gradients of a scanned chunk, by a group.
__device__ __forceinline__ void chunk_gradients(const Arguments& args, const Tokens& tokens,
                                                int first, Shared& shared, int at) {
  const int member = threadIdx.x / 32 % STATE_WARPS;
  value_gradients(args, tokens, first + at * TOKENS, shared, at);
  sync_group();  // the group's rows are there
  if (member < TRIANGLES) triangle_gradient(shared, at, member);
  sync_group();
  channel_gradients(args, tokens, first, shared, at, member * 16);
}

__global__ void __launch_bounds__(THREADS, BLOCKS) backward_kernel(const Arguments args) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int warp = threadIdx.x / 32, own = warp / PARTS;  // the chunk that this warp prepares
  const int group = warp / STATE_WARPS;
  // Blocks are (segment * S + s) * H + head.
  const int heads = static_cast<int>(args.S * args.H), index = blockIdx.x % heads;
  const int64_t head = index % args.H;
  const Sequence sequence = find_sequence(args, index / args.H, SPAN);
  Tokens tokens = tokens_of(args, sequence, head);
  const Segment segment =
      find_segment((tokens.count + SPAN - 1) / SPAN, blockIdx.x / heads, gridDim.x / heads);
  if (segment.begin == segment.end && blockIdx.x >= heads) return;
  tokens.start = tokens.at(segment.begin * SPAN);
  tokens.count -= segment.begin * SPAN;
  const int spans = (tokens.count + SPAN - 1) / SPAN;
  const int own_end = (segment.end - segment.begin) * SPAN;
  const int first_checkpoint =
      static_cast<int>((sequence.first_checkpoint + segment.begin) * args.H + head);

  State d;
  if (group == 0) load_state(args.dfinal_state, index, d);
  for (int at = group; at < CHUNKS && spans > 0; at += GROUPS)
    fetch_chunk(args, tokens, (spans - 1) * SPAN, shared, at);
  for (int first = (spans - 1) * SPAN; first >= 0; first -= SPAN) {
    const int checkpoint = first_checkpoint + static_cast<int>(first / SPAN * args.H);
    const int chunks = min(CHUNKS, (tokens.count - first + TOKENS - 1) / TOKENS);
    copies_done();
    __syncthreads();  // the tensors are there
    prefetch_checkpoint(args, checkpoint);
    if (first > 0) prefetch_span(args, tokens, first - SPAN);
    prepare<DECAY, BOUNDED, PARTS>(args, tokens, first + own * TOKENS, shared.raw[own],
                                   shared.chunks[own], shared.partials[own], [] {});
    __syncthreads();  // the chunks are there
    if (first >= own_end) {
      pass_span(args, tokens, first, shared, chunks, d);
      continue;
    }
    // The chunks whose gradients this warp's group works out: from `end` back to `begin`.
    int begin = 0, end = chunks;
    if (GROUPS == 1 || group != 0) scan_span_forward(args, checkpoint, shared, chunks);
    if constexpr (GROUPS > 1) {
      if (group == 0) {
        for (int at = chunks - 1; at >= 0; --at) {
          scan_backward<true>(shared, at, d);
          if (at >= OTHERS) arrive_at<THREADS>(SCANNED_BARRIER + at);
        }
        wait_at<THREADS>(STATES_BARRIER);
        end = min(chunks, OTHERS);
      } else {
        arrive_at<THREADS>(STATES_BARRIER);
        begin = OTHERS;
      }
    }
    for (int at = end - 1; at >= begin; --at) {
      if constexpr (GROUPS == 1) {
        scan_backward<true>(shared, at, d);
        __syncwarp();
      } else if (group != 0) {
        wait_at<THREADS>(SCANNED_BARRIER + at);
      }
      chunk_gradients(args, tokens, first, shared, at);
    }
    // The last span may have fewer chunks than the one before it.
    for (int at = chunks + group; at < CHUNKS && first > 0; at += GROUPS)
      fetch_chunk(args, tokens, first - SPAN, shared, at);
  }
  if (group == 0 && segment.begin == 0) store_state(d, args.dinitial_state, index);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t heads = std::max<int64_t>(args->S * args->H, 1);
  const int64_t segments = std::min<int64_t>(blocks_at_once(BLOCKS) / heads, MOST_SEGMENTS);
  return launch<Shared>(backward_kernel, *args, std::max<int64_t>(segments, 1));
}
