#include "rwkv_jit/states.h"

namespace {

using rwkv_jit::Accumulator;
using rwkv_jit::Chunk;
using rwkv_jit::OperandA;
using rwkv_jit::OperandB;
using rwkv_jit::PADDED;
using rwkv_jit::Raw;
using rwkv_jit::ROW;
using rwkv_jit::Tokens;
using rwkv_jit::TOKENS;

constexpr int STEPS = N / 16;  // of sixteen channels
constexpr int WARPS = {{warps}};
constexpr int THREADS = WARPS * 32;
constexpr int STATE_WARPS = {{state_warps}};    // that share the state, sixteen rows each
constexpr int ROW_WARPS = STATE_WARPS / STEPS;  // that share sixteen rows
constexpr int KEY_STEPS = STEPS / ROW_WARPS;    // of sixteen keys that one has
constexpr int SPAN = {{checkpoint_tokens}};     // tokens between two checkpoints
constexpr int CHUNKS = SPAN / TOKENS;           // of a span
constexpr int PARTS = {{parts}};                // warps that prepare one
constexpr int BLOCKS = {{blocks}};              // that share a multiprocessor
using Partials = rwkv_jit::Partials<PARTS>;
constexpr int SHARED_BYTES = {{shared_bytes}};
static_assert(L == TOKENS && SPAN == CHUNKS * L);
static_assert(WARPS >= STATE_WARPS && STATE_WARPS == ROW_WARPS * STEPS);
static_assert(KEY_STEPS * ROW_WARPS == STEPS);

// A warp's sixteen rows of the state, [value, key], or some of their keys.
using State = Accumulator[KEY_STEPS][2];
using StateRows = Element[N][ROW];  // a state, rounded, [value, key]

// The first of them.
__device__ __forceinline__ int own_value() {
  return threadIdx.x / 32 % STATE_WARPS / ROW_WARPS * 16;
}
__device__ __forceinline__ int own_key() {
  return ROW_WARPS == 1 ? 0 : threadIdx.x / 32 % ROW_WARPS * KEY_STEPS * 16;
}

// This lane's first place in a head's state, and how far from there its others are.
__device__ __forceinline__ int64_t state_place(int64_t head_index) {
  const int row = own_value() + threadIdx.x % 32 / 4, key = own_key() + threadIdx.x % 4 * 2;
  return head_index * N * N + (STATE_IS_KV ? key * N + row : row * N + key);
}
__device__ __forceinline__ int state_offset(int step, int at) {
  const int row = at / 2 % 2 * 8, key = 16 * step + at / 4 * 8 + at % 2;
  return STATE_IS_KV ? key * N + row : row * N + key;
}

__device__ __forceinline__ void load_state(const void* from, int64_t head_index, State& state) {
  const int64_t place = state_place(head_index);
#pragma unroll
  for (int step = 0; step < KEY_STEPS; ++step)
#pragma unroll
    for (int at = 0; at < 8; ++at)
      state[step][at / 4][at % 4] =
          from == nullptr ? 0.0f
                          : rwkv_jit::load_at<StateElement>(from, place + state_offset(step, at));
}

__device__ __forceinline__ void store_state(const State& state, void* to, int64_t head_index) {
  if (to == nullptr) return;
  const int64_t place = state_place(head_index);
#pragma unroll
  for (int step = 0; step < KEY_STEPS; ++step)
#pragma unroll
    for (int at = 0; at < 8; ++at)
      rwkv_jit::store_at<StateElement>(to, place + state_offset(step, at),
                                       state[step][at / 4][at % 4]);
}

__device__ __forceinline__ Tokens tokens_of(const Arguments& args,
                                            const rwkv_jit::Sequence& sequence, int64_t head) {
  return {(sequence.begin * args.H + head) * N, static_cast<int>(args.H * N),
          static_cast<int>(sequence.end - sequence.begin)};
}

// Checkpoints are 16 x 16 blocks, [row step, key step], in each of which tiles lie as the lanes
// hold them: [tile, lane, 4], or, rounded to bf16, the rows of a tile's 8 x 8 matrices:
// [tile, 2, lane, 2].
constexpr bool ROUNDED_CHECKPOINTS = {{rounded_checkpoints}};
constexpr int CHECKPOINT_VALUE = ROUNDED_CHECKPOINTS ? 2 : 4;  // bytes
constexpr int CHECKPOINT_BYTES = N * N * CHECKPOINT_VALUE;
// This warp's part of one.
__device__ __forceinline__ char* checkpoint_place(void* checkpoints, int64_t index) {
  return static_cast<char*>(checkpoints) + index * CHECKPOINT_BYTES +
         (own_value() / 16 * STEPS + own_key() / 16) * 16 * 16 * CHECKPOINT_VALUE;
}

// Writes checkpoint `index` of all heads, if any are wanted.
template <typename Args>
__device__ __forceinline__ void store_checkpoint(const Args& args, int64_t index,
                                                 const State& state) {
  void* const checkpoints = rwkv_jit::States<Args>::checkpoints(args);
  if (checkpoints == nullptr) return;
  constexpr int TOGETHER = ROUNDED_CHECKPOINTS ? 2 : 4;  // values of a lane
  char* const place =
      checkpoint_place(checkpoints, index) + threadIdx.x % 32 * TOGETHER * CHECKPOINT_VALUE;
#pragma unroll
  for (int tile = 0; tile < 2 * KEY_STEPS; ++tile) {
    const Accumulator& four = state[tile / 2][tile % 2];
    if constexpr (ROUNDED_CHECKPOINTS) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        rwkv_jit::store_pair<rwkv_jit::bf16>(
            reinterpret_cast<uint32_t*>(place)[(tile * 2 + half) * 32],
            make_float2(four[2 * half], four[2 * half + 1]));
    } else {
      rwkv_jit::put(four, reinterpret_cast<float4*>(place)[tile * 32]);
    }
  }
}
template <typename Args>
__device__ __forceinline__ void load_checkpoint(const Args& args, int64_t index, State& state) {
  constexpr int TOGETHER = ROUNDED_CHECKPOINTS ? 2 : 4;
  const char* const place =
      checkpoint_place(args.checkpoints, index) + threadIdx.x % 32 * TOGETHER * CHECKPOINT_VALUE;
#pragma unroll
  for (int tile = 0; tile < 2 * KEY_STEPS; ++tile) {
    Accumulator& four = state[tile / 2][tile % 2];
    if constexpr (ROUNDED_CHECKPOINTS) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float2 pair = rwkv_jit::load_pair<rwkv_jit::bf16>(
            reinterpret_cast<const uint32_t*>(place)[(tile * 2 + half) * 32]);
        four[2 * half] = pair.x, four[2 * half + 1] = pair.y;
      }
    } else {
      rwkv_jit::get(reinterpret_cast<const float4*>(place)[tile * 32], four);
    }
  }
}

// This warp's part of a state, rounded, to rows of shared memory.
template <typename Rows>
__device__ __forceinline__ void store_state_rows(const State& state, Rows& to) {
#pragma unroll
  for (int step = 0; step < KEY_STEPS; ++step)
    rwkv_jit::store_rows(rwkv_jit::to_operand(state[step][0], state[step][1]),
                         &to[own_value()][own_key() + 16 * step]);
}

// state <- state diag(total), for a step of keys.
__device__ __forceinline__ void decay_keys(Accumulator (&state)[2], const float* total) {
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
    const float2 decay = *reinterpret_cast<const float2*>(total + 8 * tile + threadIdx.x % 4 * 2);
    Accumulator& sum = state[tile];
    sum[0] *= decay.x, sum[1] *= decay.y;
    sum[2] *= decay.x, sum[3] *= decay.y;
  }
}

// Asks the second-level cache for a checkpoint, by COUNT threads.
template <int COUNT, typename Args>
__device__ __forceinline__ void prefetch_checkpoint(const Args& args, int64_t index, int thread) {
  const char* state = static_cast<const char*>(args.checkpoints) + index * CHECKPOINT_BYTES;
#pragma unroll 1
  for (int at = thread * 128; at < CHECKPOINT_BYTES; at += COUNT * 128)
    rwkv_jit::prefetch(state + at);
}

template <typename Shared, typename... Others>
int launch(void (*kernel)(Arguments, Others...), const Arguments& args, int64_t blocks,
           const Others&... others) {
  static_assert(sizeof(Shared) == SHARED_BYTES, "the spec knows how much it is");
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (error != cudaSuccess) return error;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  kernel<<<static_cast<unsigned>(blocks), THREADS, SHARED_BYTES, stream>>>(args, others...);
  return cudaGetLastError();
}

}  // namespace

#include "rwkv_jit/cuda/error.h"
