// wkv7 backward, token by token, in float: one block per sequence and head, from the last token to
// the first.
//   G_t = dL/dS_t,   g_t = G_t + dy_t r_t^T,   dsa_t = g_t b_t
//   G_{t-1} = g_t diag(d_t) + dsa_t a_t^T
//   dr = S_t^T dy   dv = g k   dk = g^T v   db = g^T (S_{t-1} a)   da = S_{t-1}^T dsa
//   dd = sum over rows of g S_{t-1}, element by element
// The states of STEP tokens are made again from the chunk's checkpoint and kept in registers, so
// the decay is never divided by. Where a head has more rows than fit, groups of rows take turns,
// and G of those that wait lies in dstate. Sums over rows: in the warp by halving, then over warps
// in order.
#include <cuda_runtime.h>

//% include "prelude.h"
#include "rwkv_jit/cuda/decay.cuh"
#include "rwkv_jit/cuda/element.cuh"
#include "rwkv_jit/cuda/wkv7_recurrence.cuh"
//% include "cuda_types.h"

namespace {

using namespace rwkv_jit;

constexpr int WARPS = {{warps}};
constexpr int ROWS = {{rows_per_lane}};
constexpr int STEP = {{step_tokens}};
constexpr int THREADS = WARPS * 32;
constexpr int WARP_ROWS = Tile<N>::ROW_LANES * ROWS;
constexpr int BLOCK_ROWS = WARPS * WARP_ROWS;
constexpr int GROUPS = N / BLOCK_ROWS;
static_assert(GROUPS * BLOCK_ROWS == N, "groups of rows make up a head");
static_assert(L % STEP == 0, "a chunk is a whole number of steps");

enum Vector { R, K, V, A, B, DY, KEEP, CHANGE, SLOPE, VECTORS };
enum Gradient { DR, DW, DK, DA, DB, GRADIENTS };  // those that are sums over rows

struct Shared {
  float tokens[STEP][VECTORS][N];
  float sums[WARPS][STEP][GRADIENTS][N];  // each warp's part
};

// G's row of a head whose rows take turns.
template <typename Args>
__device__ __forceinline__ float* waiting_row(const Args& args, int64_t head_index, int row) {
  if constexpr (GROUPS > 1) {
    return static_cast<float*>(args.dstate) + (head_index * N + row) * N;
  } else {
    return nullptr;
  }
}

// Reads, converts and gates a step of tokens; those past the end change nothing.
__device__ __forceinline__ void load_tokens(const Arguments& args, int64_t first, int64_t end,
                                            int64_t head, Shared& shared) {
  __syncthreads();  // the last tokens' readers are done
  for (int at = threadIdx.x; at < STEP * N; at += THREADS) {
    const int t = at / N, j = at % N;
    float (&token)[VECTORS][N] = shared.tokens[t];
    if (first + t < end) {
      const int64_t from = ((first + t) * args.H + head) * N + j;
      const Decay decay = decay_of<DECAY>(load_decay(args, from));
      token[R][j] = load_at<Element>(args.r, from);
      token[K][j] = load_at<Element>(args.k, from);
      token[V][j] = load_at<Element>(args.v, from);
      token[A][j] = load_at<Element>(args.a, from);
      token[B][j] = load_at<Element>(args.b, from);
      token[DY][j] = load_at<Element>(args.dy, from);
      token[KEEP][j] = decay.keep;
      token[CHANGE][j] = decay.change;
      token[SLOPE][j] = decay.slope;
    } else {
#pragma unroll
      for (int vector = 0; vector < VECTORS; ++vector)
        token[vector][j] = vector == KEEP ? 1.0f : 0.0f;
    }
  }
  __syncthreads();
}

// Adds up the warps' parts and writes the gradients of a step's tokens.
__device__ __forceinline__ void store_gradients(const Arguments& args, int64_t first, int64_t end,
                                                int64_t head, const Shared& shared) {
  __syncthreads();  // every warp's part is there
  for (int at = threadIdx.x; at < STEP * N; at += THREADS) {
    const int t = at / N, j = at % N;
    if (first + t >= end) continue;
    float sums[GRADIENTS] = {};
    for (int warp = 0; warp < WARPS; ++warp)
#pragma unroll
      for (int gradient = 0; gradient < GRADIENTS; ++gradient)
        sums[gradient] += shared.sums[warp][t][gradient][j];
    const int64_t to = ((first + t) * args.H + head) * N + j;
    const float dw = sums[DW] * shared.tokens[t][SLOPE][j];
    store_at<Element>(args.dr, to, sums[DR]);
    store_at<Element>(args.dk, to, sums[DK]);
    store_at<Element>(args.da, to, sums[DA]);
    store_at<Element>(args.db, to, sums[DB]);
    if (args.dw_dtype == FP32) {
      store_at<float>(args.dw, to, dw);
    } else {
      store_at<Element>(args.dw, to, dw);
    }
  }
}

// A step of one group of rows: forward from `state`, then `g` backward. FIRST writes the sums over
// rows, the groups after it add to them.
template <bool FIRST>
__device__ __forceinline__ void run_step(const Arguments& args, const Tile<N>& tile, int64_t first,
                                         int64_t end, int64_t head, int first_row,
                                         float (&state)[ROWS][LANE_COLUMNS],
                                         float (&g)[ROWS][LANE_COLUMNS], Shared& shared) {
  float (&sums)[STEP][GRADIENTS][N] = shared.sums[threadIdx.x / 32];
  float history[STEP][ROWS][LANE_COLUMNS], sa[STEP][ROWS];
#pragma unroll
  for (int t = 0; t < STEP; ++t) {
    float (&token)[VECTORS][N] = shared.tokens[t];
    float v[ROWS], dy[ROWS], dr[LANE_COLUMNS] = {};
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      v[i] = token[V][first_row + i];
      dy[i] = token[DY][first_row + i];
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) history[t][i][j] = state[i][j];
    }
    state_times(tile, state, token[A], sa[t]);
    advance(tile, state, sa[t], v, token[KEEP], token[CHANGE], token[B], token[K]);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) dr[j] = fmaf(state[i][j], dy[i], dr[j]);
    tile.column_sum<!FIRST>(dr, sums[t][DR]);
  }
#pragma unroll
  for (int t = STEP - 1; t >= 0; --t) {
    float (&token)[VECTORS][N] = shared.tokens[t];
    float dv[ROWS], dsa[ROWS], row[LANE_COLUMNS];
    tile.read(token[R], row);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const float dy = token[DY][first_row + i];
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) g[i][j] = fmaf(dy, row[j], g[i][j]);
    }
    state_times(tile, g, token[K], dv);
    state_times(tile, g, token[B], dsa);
    if (tile.column_lane == 0 && first + t < end) {
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
        store_at<Element>(args.dv, ((first + t) * args.H + head) * N + first_row + i, dv[i]);
    }
    float dw[LANE_COLUMNS] = {}, dk[LANE_COLUMNS] = {}, da[LANE_COLUMNS] = {},
          db[LANE_COLUMNS] = {};
    float keep[LANE_COLUMNS], change[LANE_COLUMNS];
    tile.read(token[A], row);
    tile.read(token[KEEP], keep);
    tile.read(token[CHANGE], change);
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const float v = token[V][first_row + i];
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j) {
        const float sum = g[i][j], s = history[t][i][j];
        dw[j] = fmaf(sum, s, dw[j]);
        dk[j] = fmaf(sum, v, dk[j]);
        da[j] = fmaf(s, dsa[i], da[j]);
        db[j] = fmaf(sum, sa[t][i], db[j]);
        g[i][j] = fmaf(sum, keep[j], fmaf(sum, change[j], dsa[i] * row[j]));
      }
    }
    tile.column_sum<!FIRST>(dw, sums[t][DW]);
    tile.column_sum<!FIRST>(dk, sums[t][DK]);
    tile.column_sum<!FIRST>(da, sums[t][DA]);
    tile.column_sum<!FIRST>(db, sums[t][DB]);
  }
}

__global__ void __launch_bounds__(THREADS, 1) backward_kernel(const Arguments args) {
  extern __shared__ __align__(16) char shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const Tile<N> tile;
  const int64_t head_index = blockIdx.x;  // s * H + head
  const int64_t head = head_index % args.H;
  const int lane_row =
      static_cast<int>(threadIdx.x / 32) * WARP_ROWS + tile.row_lane * ROWS;  // in its group
  const Sequence sequence = find_sequence(args, head_index / args.H, L);

  float g[ROWS][LANE_COLUMNS];
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = group * BLOCK_ROWS + lane_row + i;
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j)
        g[i][j] =
            args.dfinal_state == nullptr
                ? 0.0f
                : load_at<StateElement>(args.dfinal_state,
                                        head_index * N * N + state_index(row, tile.column(j)));
      if constexpr (GROUPS > 1) tile.write(g[i], waiting_row(args, head_index, row));
    }
  }

  const int64_t chunks = (sequence.end - sequence.begin + L - 1) / L;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t chunk_first = sequence.begin + chunk * L;
    const float* checkpoint = static_cast<const float*>(args.checkpoints) +
                              ((sequence.first_checkpoint + chunk) * args.H + head) * N * N;
    const int64_t count = min(sequence.end - chunk_first, static_cast<int64_t>(L));
    for (int step = static_cast<int>(count - 1) / STEP; step >= 0; --step) {
      const int64_t first = chunk_first + step * STEP;
      for (int group = 0; group < GROUPS; ++group) {
        const int first_row = group * BLOCK_ROWS + lane_row;
        float state[ROWS][LANE_COLUMNS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          tile.read(checkpoint + (first_row + i) * N, state[i]);
          if constexpr (GROUPS > 1) tile.read(waiting_row(args, head_index, first_row + i), g[i]);
        }
        for (int before = 0; before < step; ++before) {
          load_tokens(args, chunk_first + before * STEP, sequence.end, head, shared);
          for (int t = 0; t < STEP; ++t) {
            float (&token)[VECTORS][N] = shared.tokens[t];
            float v[ROWS], sa[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) v[i] = token[V][first_row + i];
            state_times(tile, state, token[A], sa);
            advance(tile, state, sa, v, token[KEEP], token[CHANGE], token[B], token[K]);
          }
        }
        load_tokens(args, first, sequence.end, head, shared);
        if (group == 0) {
          run_step<true>(args, tile, first, sequence.end, head, first_row, state, g, shared);
        } else {
          run_step<false>(args, tile, first, sequence.end, head, first_row, state, g, shared);
        }
        if constexpr (GROUPS > 1) {
#pragma unroll
          for (int i = 0; i < ROWS; ++i)
            tile.write(g[i], waiting_row(args, head_index, first_row + i));
        }
      }
      store_gradients(args, first, sequence.end, head, shared);
    }
  }

  if (args.dinitial_state == nullptr) return;
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = group * BLOCK_ROWS + lane_row + i;
      if constexpr (GROUPS > 1) tile.read(waiting_row(args, head_index, row), g[i]);
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j)
        store_at<StateElement>(args.dinitial_state,
                               head_index * N * N + state_index(row, tile.column(j)), g[i][j]);
    }
  }
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t blocks = args->S * args->H;
  if (blocks == 0) return cudaSuccess;
  const int bytes = sizeof(Shared);
  const cudaError_t error =
      cudaFuncSetAttribute(backward_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const auto stream = static_cast<cudaStream_t>(args->stream);
  backward_kernel<<<static_cast<unsigned>(blocks), THREADS, bytes, stream>>>(*args);
  return cudaGetLastError();
}
