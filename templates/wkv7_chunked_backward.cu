// wkv7 backward on tensor cores: one block per sequence and head, spans of four chunks of 16 tokens
// from the last to the first. In a span: each warp prepares a chunk as in the forward; all warps
// take the state from the span's checkpoint through the chunks (each with 16 rows), keeping the
// state before each; then, chunk by chunk from the last, they take D = dL/dS back through it
//   E = D B^^T   dV = K'' D^T + M^T dY   dX = T^T (A_qb^T dY + E^T)
//   D <- D diag(P_L) + E W + dY^T R'
// and work out the gradients (each with 16 channels; names as in wkv7_chunk.cuh):
//   U = W S^T + G V   dA_ab = tril(dX U^T, -1)  dA_ak = tril(dX V^T, -1)  dA_qb = tril(dY U^T)
//   dA_qk = tril(dY V^T)   dr = P (dY S) + p (dA_qb b~ + dA_qk k~), and so on,
// where p and ~ are the triangles' factors. The gradient of log d at a token sums what crosses it.
// In the triangles that is a difference of sums of the very products that went into them, so that
// what does not cross cancels.
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/wkv7_chunk_gradient.cuh"
//% include "chunked_types.h"

namespace {

using namespace rwkv_jit;

constexpr int PADDED = 24;  // columns of a 16-column matrix in shared memory

enum Triangle { AB, AK, QB, QK, TRIANGLES };

struct Shared {
  Chunk chunks[WARPS];
  bf16 qb[WARPS][TOKENS][PADDED];  // A_qb of each chunk
  bf16 v[SPAN][ROW], dy[SPAN][ROW];
  union {
    Raw raw[WARPS];  // until the chunks are prepared
    struct {
      bf16 state[WARPS - 1][N][ROW];  // before each chunk but the first, [value, key]
      bf16 d[N][ROW];                 // D after the chunk at hand, [value, key]
      bf16 u[N][PADDED];              // U of the chunk at hand, [value, token]
      bf16 dx[N][PADDED];             // its dX
    };
  };

  // The first chunk's state takes the place of the second's, which then is done with.
  __device__ __forceinline__ bf16 (*state_before(int at))
      [ROW] { return state[at > 0 ? at - 1 : 0]; }
  // The gradients of the triangles take the place of K'', which then is done with.
  __device__ __forceinline__ bf16* triangle(int at, int which) {
    return &chunks[at].k[0][0] + which * TOKENS * PADDED;
  }
};
static_assert(sizeof(Chunk::k) + sizeof(Chunk::b) >= TRIANGLES * TOKENS * PADDED * 2,
              "the triangles fit over K'' and B^");

__device__ __forceinline__ int own_value() { return threadIdx.x / 32 * 16; }

// S or D for this warp's rows, rounded, to rows of shared memory.
__device__ __forceinline__ void store_rows(const Accumulator (&state)[8], bf16 (*to)[ROW]) {
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) store_tile<ROW>(state[tile], &to[own_value()][8 * tile]);
}

// state <- state diag(P_L) + left_a right_a + left_b right_b.
__device__ __forceinline__ void step_state(Accumulator (&state)[8], const Chunk& chunk,
                                           const Operand& left_a,
                                           const bf16 (&right_a)[TOKENS][ROW],
                                           const Operand& left_b,
                                           const bf16 (&right_b)[TOKENS][ROW]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int pair = 0; pair < 4; ++pair) {
#pragma unroll
    for (int tile = 2 * pair; tile < 2 * pair + 2; ++tile) {
      const float2 decay = *reinterpret_cast<const float2*>(&chunk.total[8 * tile + 2 * q]);
      state[tile][0] *= decay.x, state[tile][1] *= decay.y;
      state[tile][2] *= decay.x, state[tile][3] *= decay.y;
    }
    Operand block;
    load_transposed<ROW>(&right_a[0][16 * pair], block);
    mma_pair(state[2 * pair], state[2 * pair + 1], left_a, block);
    load_transposed<ROW>(&right_b[0][16 * pair], block);
    mma_pair(state[2 * pair], state[2 * pair + 1], left_b, block);
  }
}

// The state through one chunk.
__device__ __forceinline__ void scan_forward(Shared& shared, int at, Accumulator (&state)[8]) {
  const Chunk& chunk = shared.chunks[at];
  Accumulator u[2] = {};
  Operand values, rows, block;
  load_transposed<ROW>(&shared.v[at * TOKENS][own_value()], values);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    to_operand(state[2 * step], state[2 * step + 1], rows);
    load_block<ROW>(&chunk.w[0][16 * step], block);
    mma_pair(u[0], u[1], rows, block);
  }
  Operand scanned;
  to_operand(u[0], u[1], scanned);
  step_state(state, chunk, scanned, chunk.b, values, chunk.k);
}

// U of this warp's values, from the state before the chunk.
__device__ __forceinline__ void store_u(Shared& shared, int at) {
  const Chunk& chunk = shared.chunks[at];
  Accumulator u[2] = {};
  Operand left, right;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    load_block<ROW>(&shared.state_before(at)[own_value()][16 * step], left);
    load_block<ROW>(&chunk.w[0][16 * step], right);
    mma_pair(u[0], u[1], left, right);
  }
  load_transposed<ROW>(&shared.v[at * TOKENS][own_value()], left);
  load_transposed<TOKENS>(chunk.solved[TOKENS], right);
  mma_pair(u[0], u[1], left, right);
  store_tile<PADDED>(u[0], &shared.u[own_value()][0]);
  store_tile<PADDED>(u[1], &shared.u[own_value()][8]);
}

// D back through one chunk: dV, and for the gradients D after the chunk and dX.
__device__ __forceinline__ void scan_backward(const Arguments& args, int64_t first, int64_t end,
                                              int64_t head, Shared& shared, int at,
                                              Accumulator (&d)[8]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  const Chunk& chunk = shared.chunks[at];
  store_rows(d, shared.d);
  Accumulator e[2] = {}, dv[2] = {};
  Operand dy, rows, block;
  load_transposed<ROW>(&shared.dy[at * TOKENS][own_value()], dy);
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    to_operand(d[2 * step], d[2 * step + 1], rows);
    load_block<ROW>(&chunk.b[0][16 * step], block);
    mma_pair(e[0], e[1], rows, block);
    load_block<ROW>(&chunk.k[0][16 * step], block);
    mma_pair(dv[0], dv[1], block, rows);
  }
  load_transposed<PADDED>(&chunk.m[0][0], block);
  mma_pair(dv[0], dv[1], block, dy);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int64_t token = first + g + row * 8;
      if (token >= end) continue;
      bf16* to = static_cast<bf16*>(args.dv) + (token * args.H + head) * N + own_value() +
                 tile * 8 + 2 * q;
      *reinterpret_cast<uint32_t*>(to) = pack(dv[tile][2 * row], dv[tile][2 * row + 1]);
    }
  Operand scanned;
  to_operand(e[0], e[1], scanned);
  step_state(d, chunk, scanned, chunk.w, dy, chunk.r);
  load_transposed<PADDED>(&shared.qb[at][0][0], block);
  mma_pair(e[0], e[1], dy, block);  // dU
  Operand du;
  to_operand(e[0], e[1], du);
  Accumulator dx[2] = {};
  load_block<TOKENS>(chunk.solved[0], block);
  mma_pair(dx[0], dx[1], du, block);
  store_tile<PADDED>(dx[0], &shared.dx[own_value()][0]);
  store_tile<PADDED>(dx[1], &shared.dx[own_value()][8]);
}

// The gradient of one of the triangles, by this warp.
__device__ __forceinline__ void triangle_gradient(Shared& shared, int at) {
  const int which = threadIdx.x / 32;
  Accumulator sum[2] = {};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    Operand left, right;
    if (which == AB || which == AK) {
      load_transposed<PADDED>(&shared.dx[16 * step][0], left);
    } else {
      load_block<ROW>(&shared.dy[at * TOKENS][16 * step], left);
    }
    if (which == AB || which == QB) {
      load_transposed<PADDED>(&shared.u[16 * step][0], right);
    } else {
      load_block<ROW>(&shared.v[at * TOKENS][16 * step], right);
    }
    mma_pair(sum[0], sum[1], left, right);
  }
  if (which == AB || which == AK) {
    lower_triangle<true>(sum);
  } else {
    lower_triangle<false>(sum);
  }
  store_tile<PADDED>(sum[0], shared.triangle(at, which));
  store_tile<PADDED>(sum[1], shared.triangle(at, which) + 8);
}

// sum over values of S0 D, for this lane's four channels, in every lane of a column.
__device__ __forceinline__ void state_overlap(Shared& shared, int at, float (&overlap)[4]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
#pragma unroll
  for (int x = 0; x < 4; ++x) overlap[x] = 0.0f;
#pragma unroll
  for (int value = g; value < N; value += 8)
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int column = 8 * (2 * warp + side) + 2 * q;
      const uint32_t s =
          *reinterpret_cast<const uint32_t*>(&shared.state_before(at)[value][column]);
      const uint32_t d = *reinterpret_cast<const uint32_t*>(&shared.d[value][column]);
      overlap[2 * side] = fmaf(low_of(s), low_of(d), overlap[2 * side]);
      overlap[2 * side + 1] = fmaf(high_of(s), high_of(d), overlap[2 * side + 1]);
    }
#pragma unroll
  for (int x = 0; x < 4; ++x)
#pragma unroll
    for (int step = 4; step < 32; step *= 2)
      overlap[x] += __shfl_xor_sync(0xffffffffu, overlap[x], step);
}

// Gradients of r, w, k, a and b for this warp's sixteen channels of a chunk.
__device__ __forceinline__ void channel_gradients(const Arguments& args, int64_t first, int64_t end,
                                                  int64_t head, Shared& shared, int at,
                                                  const Loaded& loaded) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, key = warp * 16;
  const bool valid[2] = {first + g < end, first + g + 8 < end};
  Factors factors;
  factors.load<DECAY>(loaded.w, valid);
  Factored r, k, a, b;
  r.set(loaded.r, factors.p, factors.bounded);
  a.set(loaded.a, factors.p_before, factors.bounded_before);
  k.set(loaded.k, factors.to_end, factors.to_middle);
  b.set(loaded.b, factors.to_end, factors.to_middle);

  Accumulator dr_state[2] = {}, da_state[2] = {}, dk_state[2] = {}, db_state[2] = {};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    Operand left, right;
    load_transposed<ROW>(&shared.state_before(at)[16 * step][key], right);
    load_block<ROW>(&shared.dy[at * TOKENS][16 * step], left);
    mma_pair(dr_state[0], dr_state[1], left, right);
    load_transposed<PADDED>(&shared.dx[16 * step][0], left);
    mma_pair(da_state[0], da_state[1], left, right);
    load_transposed<ROW>(&shared.d[16 * step][key], right);
    load_block<ROW>(&shared.v[at * TOKENS][16 * step], left);
    mma_pair(dk_state[0], dk_state[1], left, right);
    load_transposed<PADDED>(&shared.u[16 * step][0], left);
    mma_pair(db_state[0], db_state[1], left, right);
  }
  Accumulator dr[2] = {}, da[2] = {}, dk[2] = {}, db[2] = {};
  {
    Operand left, k_turned, b_turned;
    transpose(k.triangle, k_turned);
    transpose(b.triangle, b_turned);
    load_block<PADDED>(shared.triangle(at, QB), left);
    mma_pair(dr[0], dr[1], left, b_turned);
    load_block<PADDED>(shared.triangle(at, QK), left);
    mma_pair(dr[0], dr[1], left, k_turned);
    load_block<PADDED>(shared.triangle(at, AB), left);
    mma_pair(da[0], da[1], left, b_turned);
    load_block<PADDED>(shared.triangle(at, AK), left);
    mma_pair(da[0], da[1], left, k_turned);
  }
  {
    Operand left, r_turned, a_turned;
    transpose(r.triangle, r_turned);
    transpose(a.triangle, a_turned);
    load_transposed<PADDED>(shared.triangle(at, QB), left);
    mma_pair(db[0], db[1], left, r_turned);
    load_transposed<PADDED>(shared.triangle(at, AB), left);
    mma_pair(db[0], db[1], left, a_turned);
    load_transposed<PADDED>(shared.triangle(at, QK), left);
    mma_pair(dk[0], dk[1], left, r_turned);
    load_transposed<PADDED>(shared.triangle(at, AK), left);
    mma_pair(dk[0], dk[1], left, a_turned);
  }

  float overlap[4], dw[2][4];
  state_overlap(shared, at, overlap);
#pragma unroll
  for (int x = 0; x < 4; ++x) {
    // What crosses a token: from states before it to rows at or after it (a: after it alone), from
    // columns before it to the state after the chunk, in the triangles, and from state to state.
    float later[2], earlier[2], triangle[2], from_state[2], crossing[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      later[row] = element(a.state, row, x) * element(da_state, row, x);
      triangle[row] = element(a.triangle, row, x) * element(da, row, x);
      from_state[row] = element(r.state, row, x) * element(dr_state, row, x);
      crossing[row] = element(r.triangle, row, x) * element(dr, row, x) -
                      element(k.triangle, row, x) * element(dk, row, x) -
                      element(b.triangle, row, x) * element(db, row, x);
      earlier[row] = element(k.state, row, x) * element(dk_state, row, x) +
                     element(b.state, row, x) * element(db_state, row, x);
    }
    move_token<true>(later[0], later[1]);
    move_token<true>(triangle[0], triangle[1]);
    move_token<false>(earlier[0], earlier[1]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      from_state[row] += later[row];
      crossing[row] += triangle[row];
    }
    running_sum_back(from_state[0], from_state[1]);
    running_sum_back(crossing[0], crossing[1]);
    running_sum(earlier[0], earlier[1]);
    const int column = 8 * (2 * warp + x / 2) + 2 * (threadIdx.x % 4) + x % 2;
    const float through = shared.chunks[at].total[column] * overlap[x];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      // The triangles have the bounded decay; what crosses this token has its own in truth.
      const float excess = factors.log_d[row][x] - fmaxf(factors.log_d[row][x], STRONGEST);
      const float dlog_d =
          from_state[row] + earlier[row] + through + crossing[row] * exp2_fast(excess);
      dw[row][x] = dlog_d * decay_slope<DECAY>(factors.log_d[row][x]);
    }
  }
  if (args.dw_dtype == FP32) {
    store_gradient<float>(args.dw, first, end, args.H, head, dw);
  } else {
    store_gradient<bf16>(args.dw, first, end, args.H, head, dw);
  }
  float sum[2][4];
  const auto finish = [&](void* to, const Accumulator(&state)[2], const Accumulator(&triangle)[2],
                          const float (&state_factor)[2][4], const float (&triangle_factor)[2][4]) {
#pragma unroll
    for (int row = 0; row < 2; ++row)
#pragma unroll
      for (int x = 0; x < 4; ++x)
        sum[row][x] = element(state, row, x) * state_factor[row][x] +
                      element(triangle, row, x) * triangle_factor[row][x];
    store_gradient<bf16>(to, first, end, args.H, head, sum);
  };
  finish(args.dr, dr_state, dr, factors.p, factors.bounded);
  finish(args.da, da_state, da, factors.p_before, factors.bounded_before);
  finish(args.dk, dk_state, dk, factors.to_end, factors.to_middle);
  finish(args.db, db_state, db, factors.to_end, factors.to_middle);
}

__global__ void __launch_bounds__(WARPS * 32, 2) backward_kernel(const Arguments args) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int warp = threadIdx.x / 32;
  const int64_t head_index = blockIdx.x;  // s * H + head
  const int64_t head = head_index % args.H;
  const Sequence sequence = find_sequence(args, head_index / args.H, SPAN);
  const int64_t spans = (sequence.end - sequence.begin + SPAN - 1) / SPAN;

  Accumulator d[8];
  load_state(args.dfinal_state, head_index, d);
  for (int64_t span = spans - 1; span >= 0; --span) {
    const int64_t first = sequence.begin + span * SPAN;
    const int64_t left = sequence.end - first;
    const int chunks = left >= SPAN ? WARPS : static_cast<int>(left + TOKENS - 1) / TOKENS;
    const int64_t place = sequence.first_checkpoint + span;
    fetch(args, first + warp * TOKENS, sequence.end, head, shared.raw[warp]);
    copy_rows(args.v, args.H, first, sequence.end, head, shared.v);
    copy_rows(args.dy, args.H, first, sequence.end, head, shared.dy);
    copies_done();
    __syncthreads();
    prepare<DECAY>(args, first + warp * TOKENS, sequence.end, head, shared.raw[warp],
                   shared.chunks[warp], &shared.qb[warp][0][0]);
    __syncthreads();  // the chunks are there, and nobody needs the raw tensors
    Accumulator state[8];
    load_checkpoint(args, head, place, state);
    for (int at = 0; at + 1 < chunks; ++at) {
      scan_forward(shared, at, state);
      store_rows(state, shared.state_before(at + 1));
    }
    for (int at = chunks - 1; at >= 0; --at) {
      const int64_t token = first + at * TOKENS;
      if (at == 0) {
        load_checkpoint(args, head, place, state);
        store_rows(state, shared.state_before(0));
      }
      __syncwarp();  // the warp's rows of the state before the chunk are there
      store_u(shared, at);
      scan_backward(args, token, sequence.end, head, shared, at, d);
      __syncthreads();  // D, U and dX of all rows are there
      triangle_gradient(shared, at);
      Loaded loaded;
      loaded.load(args, token, sequence.end, head);
      __syncthreads();
      channel_gradients(args, token, sequence.end, head, shared, at, loaded);
      __syncthreads();  // their readers are done
    }
  }
  store_state(d, args.dinitial_state, head_index);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t blocks = args->S * args->H;
  if (blocks == 0) return cudaSuccess;
  const int bytes = sizeof(Shared);
  static_assert(sizeof(Shared) == SHARED_BYTES, "the spec knows how much it is");
  const cudaError_t error =
      cudaFuncSetAttribute(backward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const auto stream = static_cast<cudaStream_t>(args->stream);
  backward_kernel<<<static_cast<unsigned>(blocks), WARPS * 32, bytes, stream>>>(*args);
  return cudaGetLastError();
}
