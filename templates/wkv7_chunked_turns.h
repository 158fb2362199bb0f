// Blocks take turns at a sequence: how they are given out, and D goes from one to the next.
namespace {

using namespace rwkv_jit;

// D of a sequence and head as the lanes hold it, between blocks that share the sequence.
__device__ __forceinline__ float4* handed_over(const Arguments& args, int64_t index) {
  return reinterpret_cast<float4*>(static_cast<float*>(args.handed_over) + index * N * N) +
         own_value() / 16 * STEPS * 2 * 32 + threadIdx.x % 32;
}

// A turn is a run of a sequence and head's spans, the first turn the last of them; each begins with
// D as the one before left it. They are taken in an order in which each comes after that one, so
// that one that is waited for is under way, however many blocks run.
__device__ __forceinline__ Turn next_turn(const Arguments& args, const Turns& given) {
  const int ticket = atomicAdd(static_cast<int*>(args.turns), 1);
  const bool packed = args.cu_seqlens != nullptr;
  const Turns turns = packed ? planned_turns(args) : given;
  const bool over = ticket >= turns.count;
  const int heads = static_cast<int>(args.H), sequences = static_cast<int>(args.S);
  const int head = over ? 0 : ticket % heads, at = over ? 0 : ticket / heads;
  const int s = packed ? listed_turn(args, at)[0] : at % sequences;
  const int number = packed ? listed_turn(args, at)[1] : at / sequences;
  const Sequence sequence = find_sequence(args, s, SPAN);
  const Tokens tokens = tokens_of(args, sequence, head);
  const int spans = (tokens.count + SPAN - 1) / SPAN - number * turns.spans;
  return {tokens,
          s * heads + head,
          number,
          spans,
          max(spans - turns.spans, 0) * SPAN,
          static_cast<int>((sequence.first_checkpoint + spans - 1) * args.H + head),
          turns.hurried,
          over};
}
__device__ __forceinline__ void take_over(const Arguments& args, const Turn& turn, State& d) {
  const int index = turn.index;
  if (turn.number == 0) {
    load_state(args.dfinal_state, index, d);
    return;
  }
  if (threadIdx.x == 0)
    while (atomicAdd(turns_done(args, index), 0) < turn.number) __nanosleep(100);
  sync_state();
  __threadfence();
  const float4* from = handed_over(args, index);
#pragma unroll
  for (int tile = 0; tile < 2 * STEPS; ++tile) get(__ldcg(from + tile * 32), d[tile / 2][tile % 2]);
}
// Leaves D for the next turn.
__device__ __forceinline__ void hand_over(const Arguments& args, int64_t index, const State& d) {
  float4* to = handed_over(args, index);
#pragma unroll
  for (int tile = 0; tile < 2 * STEPS; ++tile) put(d[tile / 2][tile % 2], to[tile * 32]);
  __threadfence();
  sync_state();
  if (threadIdx.x == 0) atomicAdd(turns_done(args, index), 1);
}
// The same ahead of the gradients of a turn's last span, as another block may wait for it.
__device__ __forceinline__ void hand_over_ahead(const Arguments& args, Shared& shared, int chunks,
                                                int last, const State& d) {
  State ahead;
  Accumulator none[2];
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int at = 0; at < 8; ++at) ahead[step][at / 4][at % 4] = d[step][at / 4][at % 4];
  for (int at = chunks - 1; at >= 0; --at)
    scan_backward<true>(args, 0, shared, place_of(at, chunks, last), ahead, none);
  hand_over(args, shared.turn.index, ahead);
}

}  // namespace
