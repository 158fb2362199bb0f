// How sequences are cut into turns, and in which order blocks take them.
#include "rwkv_jit/cuda/blocks.h"

namespace {

using namespace rwkv_jit;

struct Turns {
  int spans;    // of a turn
  int count;    // of all heads
  int hurried;  // blocks wait for D: it is handed over ahead of a turn's last gradients
};

// args.turns: how many have been taken, and the Turns if sequences are packed; how many of each
// sequence and head are done; and, of packed ones, in their order, each turn's sequence and number.
constexpr int HEADER = 1 + sizeof(Turns) / sizeof(int);
__device__ __forceinline__ int* turns_done(const Arguments& args, int64_t index) {
  return static_cast<int*>(args.turns) + HEADER + index;
}
__device__ __forceinline__ int* listed_turn(const Arguments& args, int at) {
  return turns_done(args, args.S * args.H) + 2 * at;
}
__device__ __forceinline__ Turns& planned_turns(const Arguments& args) {
  return *reinterpret_cast<Turns*>(static_cast<int*>(args.turns) + 1);
}

constexpr int MOST_TURNS = 60000;  // of a sequence: a product of two such numbers has 32 bits

// A turn's spans and whether it is hurried, where a head's sequences have so many spans together
// and the longest so many. Where heads are many, sixteen turns for each block, so that all end at
// about the same time. Where they are few, blocks share a sequence. Of a turn of n spans n - 0.85
// lie between D's coming and its going, so that n / (n - 0.85) blocks at a head need not wait.
RWKV_JIT_SHARED_CODE Turns cut_into_turns(const Arguments& args, int spans, int longest,
                                          int at_once) {
  if (longest < 1) longest = 1;
  const int all = spans * static_cast<int>(args.H), together = all / longest;  // heads, in the mean
  int turn = longest;
  if (args.S * args.H <= {{most_shared}})  // there is no place for more to hand over
    turn = together < at_once ? at_once * 85 / ((at_once - together) * 100) : all / (16 * at_once);
  const int shortest = longest / MOST_TURNS + 1;
  turn = turn < shortest ? shortest : turn > longest ? longest : turn;
  return {turn, 0, together < at_once};
}

// How many turns a sequence of so many spans is; one without any still hands D through.
RWKV_JIT_SHARED_CODE int turns_of(int spans, const Turns& turns) {
  return spans == 0 ? 1 : (spans + turns.spans - 1) / turns.spans;
}

constexpr int PLAN_WARPS = 8, PLAN_BLOCKS = 16;

template <typename Join>
__device__ __forceinline__ int of_block(int value, const Join& join) {
  __shared__ int of_warps[PLAN_WARPS];
  for (int step = 1; step < 32; step *= 2)
    value = join(value, __shfl_xor_sync(0xffffffffu, value, step));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = of_warps[0];
  for (int warp = 1; warp < PLAN_WARPS; ++warp) value = join(value, of_warps[warp]);
  __syncthreads();
  return value;
}

// Of packed sequences, whose lengths the GPU alone knows. A sequence's turns are spread evenly
// among all of them, so that blocks need not wait for D of a long one while there are others, and
// none is left to the end. The longest has one in each of as many places as it has turns; each
// other, by what it has of them, in some.
__global__ void __launch_bounds__(PLAN_WARPS * 32)
    plan_kernel(const Arguments args, const int at_once) {
  const int sequences = static_cast<int>(args.S), lane = threadIdx.x % 32;
  const auto spans_of = [&](int s) {
    const Sequence sequence = find_sequence(args, s, SPAN);
    return static_cast<int>((sequence.end - sequence.begin + SPAN - 1) / SPAN);
  };
  const auto add = [](int a, int b) { return a + b; };
  int spans = 0, longest = 0, count = 0;
  for (int s = threadIdx.x; s < sequences; s += PLAN_WARPS * 32) {
    const int own = spans_of(s);
    spans += own, longest = max(longest, own);
  }
  spans = of_block(spans, add);
  longest = of_block(longest, [](int a, int b) { return max(a, b); });
  Turns turns = cut_into_turns(args, spans, longest, at_once);
  for (int s = threadIdx.x; s < sequences; s += PLAN_WARPS * 32)
    count += turns_of(spans_of(s), turns);
  // Not more than there is place for, which bounds that no packed batch has could ask for.
  const int listed = min(of_block(count, add), static_cast<int>(args.T / SPAN) + sequences);
  turns.count = listed * static_cast<int>(args.H);
  const int thread = blockIdx.x * PLAN_WARPS * 32 + threadIdx.x;
  if (thread == 0) *static_cast<int*>(args.turns) = 0, planned_turns(args) = turns;
  for (int64_t at = thread; at < args.S * args.H; at += PLAN_BLOCKS * PLAN_WARPS * 32)
    *turns_done(args, at) = 0;

  const unsigned places = turns_of(longest, turns);
  // How many turns of sequence s come before a place; shifted, or those of short ones would all be
  // in the last.
  const auto before = [&](int s, int place) -> int {
    if (s >= sequences) return 0;
    return (static_cast<unsigned>(turns_of(spans_of(s), turns)) * place + s % 64 * places / 64) /
           places;
  };
  for (int place = thread / 32; place < places; place += PLAN_BLOCKS * PLAN_WARPS) {
    int at = 0;
    for (int s = lane; s < sequences; s += 32) at += before(s, place);
    for (int step = 1; step < 32; step *= 2) at += __shfl_xor_sync(0xffffffffu, at, step);
    for (int first = 0; first < sequences; first += 32) {
      const int s = first + lane, number = before(s, place);
      const int is_here = before(s, place + 1) > number;
      const unsigned alike = __match_any_sync(0xffffffffu, is_here);
      const unsigned here = is_here ? alike : ~alike;
      const int own = at + __popc(here & ((1u << lane) - 1));
      if (is_here && own < listed) {
        listed_turn(args, own)[0] = s;
        listed_turn(args, own)[1] = number;
      }
      at += __popc(here);
    }
  }
}

// What the kernel is to know of the turns, those of packed sequences aside.
inline cudaError_t begin_turns(const Arguments& args, int at_once, Turns& turns) {
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const int spans = static_cast<int>((args.T + SPAN - 1) / SPAN);
  if (args.cu_seqlens != nullptr) {
    plan_kernel<<<PLAN_BLOCKS, PLAN_WARPS * 32, 0, stream>>>(args, at_once);
    return cudaGetLastError();
  }
  turns = cut_into_turns(args, static_cast<int>(args.S) * spans, spans, at_once);
  turns.count = static_cast<int>(args.S * args.H) * turns_of(spans, turns);
  return cudaMemsetAsync(args.turns, 0, (HEADER + args.S * args.H) * sizeof(int), stream);
}

}  // namespace
