// Blocks take turns at a sequence: how they are given out, and D goes from one to the next.
namespace {

using namespace rwkv_jit;

// D of a sequence and head as the lanes hold it, between blocks that share the sequence.
__device__ __forceinline__ float4* handed_over(const Arguments& args, int64_t index) {
  return reinterpret_cast<float4*>(static_cast<float*>(args.handed_over) + index * N * N) +
         own_value() / 16 * STEPS * 2 * 32 + threadIdx.x % 32;
}

// A turn is a run of a sequence and head's spans, the first turn the last of them; each begins with
// D as the one before left it. They are given out in their order, every head's first one before any
// second one, so that one that is waited for is under way, however many blocks run.
struct Turns {
  int spans;         // of a turn
  int count, heads;  // of all; ticket = turn * heads + sequence and head
};
__device__ __forceinline__ int* turns_done(const Arguments& args, int64_t index) {
  return static_cast<int*>(args.turns) + 1 + index;
}
__device__ __forceinline__ int take_turn(const Arguments& args, Shared& shared) {
  __syncthreads();  // every thread is done with the last one
  if (threadIdx.x == 0) shared.ticket = atomicAdd(static_cast<int*>(args.turns), 1);
  __syncthreads();
  return shared.ticket;
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
  for (int tile = 0; tile < 2 * STEPS; ++tile) get(__ldcg(from + tile * 32), d[tile / 2][tile % 2]);
}
// Takes D through a turn's last span ahead of its gradients, as another block may wait for it.
__device__ __forceinline__ void hand_over(const Arguments& args, int64_t index,
                                          const Tokens& tokens, Shared& shared, int chunks,
                                          const State& d) {
  State ahead;
  Accumulator none[2];
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int at = 0; at < 8; ++at) ahead[step][at / 4][at % 4] = d[step][at / 4][at % 4];
  for (int at = chunks - 1; at >= 0; --at)
    scan_backward<true>(args, tokens, 0, shared, at, ahead, none);
  float4* to = handed_over(args, index);
#pragma unroll
  for (int tile = 0; tile < 2 * STEPS; ++tile) put(ahead[tile / 2][tile % 2], to[tile * 32]);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(turns_done(args, index), 1);
}

}  // namespace
