// wkv6 and wkv5 backward on tensor cores: one block per sequence and head, spans of CHUNKS chunks
// of 16 tokens from the last to the first. In a span: its warps prepare the chunks as in the
// forward; then each takes its part of the state from the span's checkpoint through the chunks and
// its part of D = dL/dS back through them,
//   D <- D diag(P_L) + dY^T R~
// and leaves S before and D after every chunk; then each works out the gradients of its own
// channels of one chunk (names as in wkv6_chunk.cuh):
//   dA = tril(dY V^T, -1)   dg = diag(dY V^T)   dv = M^T dY + K^ D^T   du = sum of dg r k
//   dr = P- (dY S) + p dA k~ + dg u k   dk = P_L / P (V D) + p dA^T r~ + dg u r,
// where p and ~ are the triangle's factors. The gradient of log d at a token sums what crosses it:
// from states and columns before it to rows and states after it. In the triangle that is a
// difference of sums of the very products that went into it, so that what does not cross cancels.
#include <cuda_runtime.h>

#include <type_traits>

//% include "prelude.h"
//% include "wkv6_decay.h"
#include "rwkv_jit/cuda/element.cuh"
//% include "element_types.h"
#include "rwkv_jit/cuda/wkv6_chunk.cuh"
//% include "chunked_types.h"
//% include "wkv6_chunked_state.h"
//% include "wkv6_sums.h"

namespace {

static_assert(WARPS == STATE_WARPS);

struct Shared : HeadTables {
  Chunk chunks[CHUNKS];
  Raw raw[CHUNKS];
  Element v[2][SPAN][ROW], dy[2][SPAN][ROW];  // of this span and of the one before it
  Element da[CHUNKS][TOKENS][PADDED];
  float dg[CHUNKS][TOKENS];
  union {
    Partials partials[CHUNKS];  // until the chunks are prepared
    struct {
      StateRows states[CHUNKS], d[CHUNKS];  // before each chunk, and after it
    };
    float sums[CHUNKS][N];  // in the end
  };
};

// What is summed over tokens, for this lane's channels of sixteen, [tile, odd]: du, and where the
// decay is one for all what crosses it, in the triangles and against the states.
struct TokenTotals {
  float du[2][2], triangles[2][2], states[2][2];
};

// dA and dg of a chunk, by one warp.
__device__ __forceinline__ void triangle_gradient(const Element (*dy)[ROW], const Element (*v)[ROW],
                                                  Element (&da)[TOKENS][PADDED],
                                                  float (&dg)[TOKENS]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  Accumulator sum[2] = {};
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    OperandA left;
    OperandB right;
    load<ROW>(&dy[0][16 * step], left);
    load_transposed<ROW>(&v[0][16 * step], right);
    add_product(sum, left, right);
  }
  if (g / 2 == q) {
    dg[g] = g % 2 == 0 ? sum[0][0] : sum[0][1];
    dg[g + 8] = g % 2 == 0 ? sum[1][2] : sum[1][3];
  }
  lower_triangle<true>(sum);
  store_matrix(sum, da[0]);
}

// dv of sixteen values of a chunk.
__device__ __forceinline__ void value_gradients(const Arguments& args, const Tokens& tokens,
                                                int first, const Chunk& chunk, const StateRows& d,
                                                const Element (*dy)[ROW], int value) {
  Accumulator dv[2] = {};
  OperandA left;
  OperandB right;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    load<ROW>(&chunk.k[0][16 * step], left);
    load_transposed<ROW>(&d[value][16 * step], right);
    add_product(dv, left, right);
  }
  load_transposed<PADDED>(&chunk.m[0][0], left);
  load<ROW>(&dy[0][value], right);
  add_product(dv, left, right);
  store_tokens(dv, args.dv, tokens, first, value);
}

// What crosses a token in the triangle, of r * dr (rows) and k * dk (columns): rows after it from
// columns before it. What does not cross cancels, as these are the very products.
__device__ __forceinline__ void add_crossing(const Accumulator (&rows)[2],
                                             const Accumulator (&columns)[2], Accumulator (&dw)[2],
                                             TokenTotals& totals) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      const float own[2] = {rows[tile][odd], rows[tile][2 + odd]};
      if constexpr (DECAY_PER_TOKEN) {
        float upper = own[0] - columns[tile][odd], lower = own[1] - columns[tile][2 + odd];
        running_sum_back(upper, lower);
        dw[tile][odd] = upper - own[0];
        dw[tile][2 + odd] = lower - own[1];
      } else {
        const float token = threadIdx.x % 32 / 4;
        float& sum = totals.triangles[tile][odd];
        sum += token * own[0] - (token + 1) * columns[tile][odd];
        sum += (token + 8) * own[1] - (token + 9) * columns[tile][2 + odd];
      }
    }
}

// Gradients of r, w, k and u for sixteen channels of chunk `at`, from `key` on.
template <typename Given>
__device__ __forceinline__ void channel_gradients(const Arguments& args, const Tokens& tokens,
                                                  int first, const Shared& shared, int at,
                                                  const Element (*v)[ROW], const Element (*dy)[ROW],
                                                  int key, const Given& channels,
                                                  TokenTotals& totals) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const auto& [raw_r, raw_k, own] = channels;
  const OperandA own_k = {raw_k.at[0], raw_k.at[2], raw_k.at[1], raw_k.at[3]};
  Accumulator dr[2] = {}, dk[2] = {}, dw[2] = {}, log_d[2], factors[2];
  OperandA left;

  // In the triangle.
  {
    Accumulator columns[2], r_terms[2] = {}, k_terms[2] = {};
    own.of_triangle(factors, columns);
    const OperandA r = scaled(raw_r, factors), k = scaled(own_k, columns);
    load<PADDED>(&shared.da[at][0][0], left);
    add_product(dr, left, to_second(k));
    load_transposed<PADDED>(&shared.da[at][0][0], left);
    add_product(dk, left, to_second(r));
    add_overlap(r, dr, r_terms);
    add_overlap(k, dk, k_terms);
    add_crossing(r_terms, k_terms, dw, totals);
    scale(dr, factors);
    scale(dk, columns);
  }
  if constexpr (DECAY_PER_TOKEN) {
    // The triangle has the bounded decay; what crosses a token has its own in truth.
    own.log2_decays(log_d);
#pragma unroll
    for (int x = 0; x < 8; ++x)
      dw[x / 4][x % 4] *= exp2_fast(log_d[x / 4][x % 4] - fmaxf(log_d[x / 4][x % 4], STRONGEST));
  }
  // A token's own key.
  {
    Accumulator r[2], k[2];
    float bonus[2][2];
    read_bonus(shared, key, bonus);
    widen(raw_r, r);
    widen(own_k, k);
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      const float dg = shared.dg[at][g + x / 2 % 2 * 8], u = bonus[x / 4][x % 2];
      const float wide_r = r[x / 4][x % 4], wide_k = k[x / 4][x % 4];
      dr[x / 4][x % 4] = fmaf(dg * u, wide_k, dr[x / 4][x % 4]);
      dk[x / 4][x % 4] = fmaf(dg * u, wide_r, dk[x / 4][x % 4]);
      totals.du[x / 4][x % 2] = fmaf(dg * wide_r, wide_k, totals.du[x / 4][x % 2]);
    }
  }
  // Against the states. What crosses a token: from states before it to rows after it, from columns
  // before it to the state after the chunk, and from state to state.
  Accumulator dr_state[2] = {}, dk_state[2] = {}, overlap[2] = {};  // overlap is S^T D
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    OperandB right;
    load<ROW>(&shared.states[at][16 * step][key], right);
    load<ROW>(&dy[0][16 * step], left);
    add_product(dr_state, left, right);
    load<ROW>(&shared.d[at][16 * step][key], right);
    load<ROW>(&v[0][16 * step], left);
    add_product(dk_state, left, right);
    load_transposed<ROW>(&shared.states[at][16 * step][key], left);
    add_product(overlap, left, right);
  }
  Accumulator r_terms[2] = {}, k_terms[2] = {};
  load<ROW>(&shared.chunks[at].r[0][key], left);
  add_overlap(left, dr_state, r_terms);
  own.before(factors);
  scale_and_add(dr_state, factors, dr);
  store_tokens(dr_state, args.dr, tokens, first, key);
  load<ROW>(&shared.chunks[at].k[0][key], left);
  add_overlap(left, dk_state, k_terms);
  own.after(factors);
  scale_and_add(dk_state, factors, dk);
  store_tokens(dk_state, args.dk, tokens, first, key);

  float total[2][2];
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const float2 pair =
        *reinterpret_cast<const float2*>(&shared.chunks[at].total[key + 8 * tile + 2 * q]);
    total[tile][0] = pair.x, total[tile][1] = pair.y;
  }
  if constexpr (DECAY_PER_TOKEN) {
    const TokenSums sums;
    add_product(dw, sums.sum_after(), split(r_terms));
    add_product(dw, sums.sum_before(), split(k_terms));
    float through[2][2];
    diagonal(overlap, through);
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      float& sum = dw[x / 4][x % 4];
      sum = fmaf(total[x / 4][x % 2], through[x / 4][x % 2], sum);
      sum *= decay_slope<DECAY>(log_d[x / 4][x % 4]);
    }
    if (args.dw_dtype == FP32) {
      store_wide_tokens(dw, args.dw, tokens, first, key);
    } else {
      store_tokens(dw, args.dw, tokens, first, key);
    }
  } else {
    const int count = min(max(tokens.count - first, 0), TOKENS);
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      const int token = g + x / 2 % 2 * 8;
      float& sum = totals.states[x / 4][x % 2];
      sum = fmaf(static_cast<float>(token), r_terms[x / 4][x % 4], sum);
      sum = fmaf(static_cast<float>(count - 1 - token), k_terms[x / 4][x % 4], sum);
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int odd = 0; odd < 2; ++odd)
        if (2 * q + odd == g)  // the diagonal
          totals.states[tile][odd] +=
              static_cast<float>(count) * total[tile][odd] * overlap[tile][2 * tile + odd];
  }
}

// Adds up what the warps have of a sum over tokens, in the order of their chunks, into this head's
// part of a gradient.
template <typename Part>
__device__ __forceinline__ void store_total(const Part& part, Shared& shared, int own, void* to) {
  __syncthreads();  // the place is free
#pragma unroll
  for (int step = 0; step < PART_STEPS; ++step)
#pragma unroll
    for (int at = 0; at < 4; ++at) {
      const int key = own_channel() + 16 * step + at / 2 * 8 + threadIdx.x % 4 * 2 + at % 2;
      float sum = part(step, at / 2, at % 2, key);
#pragma unroll
      for (int lane = 4; lane < 32; lane *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
      if (threadIdx.x % 32 < 4) shared.sums[own][key] = sum;
    }
  __syncthreads();
  for (int key = threadIdx.x; key < N; key += THREADS) {
    float sum = 0;
    for (int chunk = 0; chunk < CHUNKS; ++chunk) sum += shared.sums[chunk][key];
    static_cast<float*>(to)[int64_t{blockIdx.x} * N + key] = sum;
  }
}

template <typename Args>
__device__ __forceinline__ void store_totals(const Args& args, Shared& shared, int own,
                                             int64_t head,
                                             const TokenTotals (&totals)[PART_STEPS]) {
  store_total([&](int step, int tile, int odd, int) { return totals[step].du[tile][odd]; }, shared,
              own, args.du_parts);
  if constexpr (!DECAY_PER_TOKEN)
    store_total(
        [&](int step, int tile, int odd, int key) {
          // The triangles have the bounded decay; what crosses a token has its own in truth.
          const float log_d = log2_decay_of<DECAY>(args, head, key),
                      ratio = exp2_fast(log_d - fmaxf(log_d, STRONGEST));
          return decay_slope<DECAY>(log_d) *
                 fmaf(ratio, totals[step].triangles[tile][odd], totals[step].states[tile][odd]);
        },
        shared, own, args.dw_parts);
}

// Asks the second-level cache for a w of float32, which is read from where it is.
__device__ __forceinline__ void prefetch_wide_decay(const Arguments& args, const Tokens& tokens,
                                                    int first) {
  if constexpr (DECAY_PER_TOKEN) {
    constexpr int LINES = N / 32;  // of a row
    static_assert(SPAN * LINES <= THREADS);
    const int row = threadIdx.x / LINES, column = threadIdx.x % LINES * 32;
    if (args.w_dtype == FP32 && row < SPAN)
      prefetch(static_cast<const float*>(args.w) + tokens.at(first + row) + column);
  }
}

__global__ void __launch_bounds__(THREADS, BLOCKS) backward_kernel(const Arguments args) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int warp = threadIdx.x / 32, own = warp / PARTS;  // the chunk that this warp prepares
  const int thread = threadIdx.x % (PARTS * 32);
  const int64_t head = blockIdx.x % args.H;  // blocks are s * H + head
  const Sequence sequence = find_sequence(args, blockIdx.x / args.H, SPAN);
  const Tokens tokens = tokens_of(args, sequence, head);
  const int spans = (tokens.count + SPAN - 1) / SPAN;
  const int first_checkpoint = static_cast<int>(sequence.first_checkpoint * args.H + head);

  TokenTotals totals[PART_STEPS] = {};
  make_tables<DECAY, THREADS>(args, head, shared);
  State d;
  load_state(args.dfinal_state, blockIdx.x, d);
  const auto fetch_values = [&](int first, int to) {
    fetch_rows<SPAN, THREADS>(args.v, tokens, first, threadIdx.x, shared.v[to]);
    fetch_rows<SPAN, THREADS>(args.dy, tokens, first, threadIdx.x, shared.dy[to]);
  };
  int first = (spans - 1) * SPAN, side = 0;
  if (spans > 0) {
    fetch<PARTS * 32>(args, tokens, first + own * TOKENS, thread, shared.raw[own]);
    fetch_values(first, side);
  }
  for (; first >= 0; first -= SPAN, side ^= 1) {
    const int own_first = first + own * TOKENS;
    const int checkpoint = first_checkpoint + static_cast<int>(first / SPAN * args.H);
    const Element(*v)[ROW] = shared.v[side], (*dy)[ROW] = shared.dy[side];
    State state;
    load_checkpoint(args, checkpoint, state);
    copies_done();
    __syncthreads();  // the tensors are there, and the last states' readers are done
    if (first > 0) {
      fetch_values(first - SPAN, side ^ 1);
      prefetch_checkpoint<THREADS>(args, checkpoint - args.H, threadIdx.x);
      prefetch_wide_decay(args, tokens, first - SPAN);
    }
    if (warp % PARTS == PARTS - 1)
      triangle_gradient(&dy[own * TOKENS], &v[own * TOKENS], shared.da[own], shared.dg[own]);
    Channels channels[PART_STEPS];
    prepare<DECAY, PARTS>(args, tokens, own_first, shared.raw[own], shared, shared.chunks[own],
                          shared.partials[own], channels);
    __syncthreads();  // the chunks are there
    if (first > 0) fetch<PARTS * 32>(args, tokens, own_first - SPAN, thread, shared.raw[own]);
#pragma unroll
    for (int at = CHUNKS - 1; at >= 0; --at) {
      store_state_rows(d, shared.d[at]);
      step_state(d, shared.chunks[at], &dy[at * TOKENS], shared.chunks[at].r);
    }
#pragma unroll
    for (int at = 0; at < CHUNKS; ++at) {
      store_state_rows(state, shared.states[at]);
      if (at + 1 < CHUNKS)
        step_state(state, shared.chunks[at], &v[at * TOKENS], shared.chunks[at].k);
    }
    __syncthreads();  // the states are there
#pragma unroll
    for (int step = 0; step < PART_STEPS; ++step) {
      const int key = own_channel() + 16 * step;
      channel_gradients(args, tokens, own_first, shared, own, &v[own * TOKENS], &dy[own * TOKENS],
                        key, channels[step], totals[step]);
      value_gradients(args, tokens, own_first, shared.chunks[own], shared.d[own], &dy[own * TOKENS],
                      key);
    }
  }
  store_state(d, args.dinitial_state, blockIdx.x);
  store_totals(args, shared, own, head, totals);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int error = launch<Shared>(backward_kernel, *args, args->S * args->H);
  return error == cudaSuccess ? launch_sums(*args) : error;
}
