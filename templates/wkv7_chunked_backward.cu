// wkv7 backward on tensor cores: blocks take turns at sequences and heads, in spans of CHUNKS
// chunks of 16 tokens from the last to the first. A span's chunks are prepared as in the forward,
// by all of a block's warps or, where one block fills a multiprocessor, by some that are apart,
// ahead of the others. Then, from the last chunk to the first, warps take the state, each 16 rows
// of it, from the span's checkpoint to the chunk, and D = dL/dS back through it
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
#include "rwkv_jit/cuda/element.cuh"
//% include "element_types.h"
#include "rwkv_jit/cuda/wkv7_chunk.cuh"
//% include "chunked_types.h"
//% include "wkv7_chunked_state.h"
//% include "wkv7_chunked_scans.h"
//% include "wkv7_chunked_plan.h"
//% include "wkv7_chunked_turns.h"
//% include "wkv7_chunked_gradients.h"

namespace {

using namespace rwkv_jit;

// Asks the second-level cache for the tensors of COUNT tokens, by as many threads as prepare a
// chunk or more.
template <int COUNT>
__device__ __forceinline__ void prefetch_tokens(const Arguments& args, const Tokens& tokens,
                                                int first, int thread) {
  constexpr int LINE = 128 / sizeof(Element), LINES = N / LINE;  // of a row
  static_assert(COUNT * LINES <= 32 * PARTS);
  if (thread >= COUNT * LINES) return;
  const int64_t line = tokens.at(first + thread / LINES) + thread % LINES * LINE;
  for (const void* tensor : {args.r, args.k, args.v, args.a, args.b, args.dy})
    prefetch(static_cast<const Element*>(tensor) + line);
  if (is_wide(args.w_dtype)) {
    prefetch(static_cast<const float*>(args.w) + line);
    prefetch(static_cast<const float*>(args.w) + line + 32);
  } else {
    prefetch(static_cast<const Element*>(args.w) + line);
  }
}

// Prepares the chunk in place `slot` by this warp and those beside it.
template <typename Shared, typename Call>
__device__ __forceinline__ void prepare_chunk(const Arguments& args, const Tokens& tokens,
                                              int first, Shared& shared, int slot,
                                              const Call& when_added) {
  // Where a warp leaves its part of the chunk's triangles.
  const auto partial = [&](int part) -> float4* {
    if constexpr (APART) {
      Element *const v = shared.v[slot * TOKENS], *const dy = shared.dy[slot * TOKENS];
      return part < 2 ? shared.partials[part] : reinterpret_cast<float4*>(part == 2 ? v : dy);
    } else {
      return shared.partials[slot][part];
    }
  };
  int part = threadIdx.x / 32 % PARTS;  // which some kernels have no register to keep
  if (APART || !BOUNDED) part = forgotten(part);
  prepare<DECAY, BOUNDED, PARTS, true>(
      args, tokens, first, TokenSums(forgotten_lane()), part, shared.raw[slot], shared.chunks[slot],
      partial, [] {}, when_added);
}

// Prepares the chunks of this block's turns where there is place, and says whose they are.
template <typename Shared>
__device__ __forceinline__ void prepare_turns(const Arguments& args, const Turns& turns,
                                              Shared& shared) {
  if constexpr (APART) {
    const int thread = threadIdx.x % (PARTS * 32);
    int slot = 0;
    if (thread < SLOTS) shared.filled[thread] = false;
    const auto begin_slot = [&](bool is_first, bool filled) {
      wait_at<THREADS>(READ_BARRIER + slot);
      if (thread != 0) return;
      if (is_first) shared.turns[slot] = shared.ahead;
      shared.filled[slot] = filled;
    };
    // For the warps that share the state, which by now work on the place before the last one.
    const auto help = [&] {
      if (!shared.filled[(slot + 1) % SLOTS]) return;
      wait_at<THREADS>(VALUES_BARRIER);
      triangle_gradient(shared, (slot + 1) % SLOTS, threadIdx.x / 32 % PARTS);
      arrive_at<THREADS>(TRIANGLES_BARRIER);
    };
    const auto end_slot = [&] {
      arrive_at<THREADS>(FULL_BARRIER + slot);
      slot = slot + 1 == SLOTS ? 0 : slot + 1;
    };
    do {
      sync_chunk<PARTS>();  // every warp is done with the last one
      if (thread == 0) shared.ahead = next_turn(args, turns);
      sync_chunk<PARTS>();
      if (shared.ahead.over || shared.ahead.spans == 0) {
        begin_slot(true, false);
        wait_at<THREADS>(EMPTY_BARRIER + slot);
        help();
        end_slot();
        continue;
      }
      const int past =
          min(shared.ahead.spans * CHUNKS, (shared.ahead.tokens.count + TOKENS - 1) / TOKENS);
      const int last = (past - 1) * TOKENS;
      for (int first = last; first >= shared.ahead.begin; first -= TOKENS) {
        begin_slot(first == last, true);
        const Tokens tokens = shared.ahead.tokens;
        fetch<PARTS * 32>(args, tokens, first, thread, shared.raw[slot]);
        if (first % SPAN != 0 || first + TOKENS >= tokens.count) {  // the span's last one
          const int later = shared.ahead.spans - 1 - first / SPAN;
          prefetch_checkpoint<PARTS * 32>(
              args, shared.ahead.checkpoint - later * static_cast<int>(args.H), thread);
        }
        copies_done();
        wait_at<THREADS>(EMPTY_BARRIER + slot);  // the tensors are there, too
        prepare_chunk(args, tokens, first, shared, slot, [&] {
          fetch_values<PARTS * 32>(args, tokens, first, thread, shared, slot);
          help();
        });
        if (first - SPAN >= shared.ahead.begin)
          prefetch_tokens<TOKENS>(args, tokens, first - SPAN, thread);
        copies_done();
        end_slot();
      }
    } while (!shared.ahead.over);
    for (int rest = 0; rest < 2; ++rest) {
      begin_slot(false, false);
      wait_at<THREADS>(EMPTY_BARRIER + slot);
      help();
      slot = slot + 1 == SLOTS ? 0 : slot + 1;
    }
  }
}

// Works out the gradients of this block's turns.
template <typename Shared>
__device__ __forceinline__ void work_on_turns(const Arguments& args, const Turns& turns,
                                              Shared& shared) {
  const int own = threadIdx.x / 32 / PARTS;  // the chunk that this warp prepares
  int slot = 0;                              // of the next chunk
  const auto await_slot = [&](int slot) { wait_at<THREADS>(FULL_BARRIER + slot); };
  const auto end_slot = [&] {
    arrive_at<THREADS>(EMPTY_BARRIER + slot);
    slot = slot + 1 == SLOTS ? 0 : slot + 1;
  };
  for (int at = 0; APART && at < SLOTS; ++at) {
    arrive_at<THREADS>(READ_BARRIER + at);
    arrive_at<THREADS>(EMPTY_BARRIER + at);
  }
  for (;;) {
    if constexpr (APART) {
      await_slot(slot);
      if (threadIdx.x == 0) shared.turn = shared.turns[slot];
    } else {
      __syncthreads();  // every thread is done with the last one
      if (threadIdx.x == 0) shared.turn = next_turn(args, turns);
    }
    sync_state();
    const Turn& turn = shared.turn;  // not in registers, which are short
    if (turn.over) return;
    State d;
    if (turn.spans == 0) {
      load_state(args.dfinal_state, turn.index, d);
      if constexpr (APART) {
        arrive_at<THREADS>(READ_BARRIER + slot);
        end_slot();
      }
    }
    const int last = (turn.spans - 1) * SPAN;
    if constexpr (!APART)
      for (int at = 0; at < CHUNKS && last >= 0; ++at)
        fetch_chunk(args, last + at * TOKENS, shared, at);
    for (int first = last; first >= turn.begin; first -= SPAN) {
      const int chunks = min(CHUNKS, (turn.tokens.count - first + TOKENS - 1) / TOKENS);
      const bool begun = first != (turn.spans - 1) * SPAN;
      if (APART && begun) await_slot(slot);
      if (threadIdx.x == 0 && begun) shared.turn.checkpoint -= static_cast<int>(args.H);
      if constexpr (APART) {
        if (!begun) fetch_checkpoint(args, turn.checkpoint, shared);
        if (chunks > 1) await_slot((slot + 1) % SLOTS);
      } else {
        copies_done();
        __syncthreads();  // the tensors are there
        prefetch_checkpoint<THREADS>(args, turn.checkpoint, threadIdx.x);
        if (first > turn.begin) prefetch_tokens<SPAN>(args, turn.tokens, first - SPAN, threadIdx.x);
        prepare_chunk(args, turn.tokens, first + own * TOKENS, shared, own, [] {});
        __syncthreads();  // the chunks are there
      }
      if constexpr (!APART) fetch_checkpoint(args, turn.checkpoint, shared);
      if (chunks > 1) scan_forward_to<true>(args, shared, place_of(0, chunks, slot));
      if (!begun) take_over(args, turn, d);
      if (turn.hurried && first == turn.begin && first > 0)
        hand_over_ahead(args, shared, chunks, slot, d);
      for (int at = chunks - 1; at >= 0; --at) {
        if (at == 0) scan_forward_to<false>(args, shared, 0);
        chunk_gradients(args, first + at * TOKENS, shared, APART ? slot : at, d);
        if constexpr (APART) end_slot();
      }
      // This span may have fewer chunks than the one before it.
      for (int at = chunks; !APART && at < CHUNKS && first > turn.begin; ++at)
        fetch_chunk(args, first - SPAN + at * TOKENS, shared, at);
    }
    if (turn.begin == 0) {
      store_state(d, args.dinitial_state, turn.index);
    } else if (!turn.hurried) {
      hand_over(args, turn.index, d);
    }
  }
}

__global__ void __launch_bounds__(THREADS, BLOCKS)
    backward_kernel(const Arguments args, const Turns turns) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  if constexpr (APART) {
    if (threadIdx.x >= STATE_WARPS * 32) {
      give_registers<104>();  // 104 + 2 * 200 = 3 * 168, with which the warps begin
      prepare_turns(args, turns, shared);
      return;
    }
    take_registers<200>();
  }
  work_on_turns(args, turns, shared);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  if (args->S * args->H == 0) return cudaSuccess;
  const int at_once = std::max(static_cast<int>(blocks_at_once(BLOCKS)), 1);
  Turns turns = {};
  const cudaError_t error = begin_turns(*args, at_once, turns);
  if (error != cudaSuccess) return error;
  const bool packed = args->cu_seqlens != nullptr;
  const int blocks = packed ? at_once : std::min(turns.count, at_once);
  return launch<Shared>(backward_kernel, *args, blocks, turns);
}
