#pragma once
// Steps around the recurrence: groups of tokens, whose channels are spread over lanes.
#include "rwkv_jit/cuda/element.cuh"

#define RWKV_JIT_STEP __device__ __forceinline__

namespace rwkv_jit {

constexpr int GROUP_THREADS = 128;  // of a block

// Calls f(0) ... f(COUNT - 1).
template <int COUNT, typename Function>
RWKV_JIT_STEP void each(const Function& f) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) f(i);
}

RWKV_JIT_STEP float exponential(float x) { return __expf(x); }
RWKV_JIT_STEP float inverse(float x) { return __fdividef(1.0f, x); }
RWKV_JIT_STEP float square_root(float x) { return sqrtf(x); }

// The channels of one lane. A unit of UNIT channels, a head or what one access to memory takes, is
// shared by LANES lanes side by side, each with WIDTH neighbours at a time.
template <typename Stored, int UNIT, int WIDTH>
struct Lane {
  using Element = Stored;
  using Real = float;
  static constexpr int PIECES = UNIT / WIDTH;
  static constexpr int lanes() {
    int count = 1;
    while (count < PIECES && count < 32) count *= 2;
    return count;
  }
  static constexpr int LANES = lanes();
  static constexpr int TURNS = (PIECES + LANES - 1) / LANES;
  static constexpr int COUNT = TURNS * WIDTH;
  static constexpr bool FULL = TURNS * LANES == PIECES;
  static constexpr int UNIT_CHANNELS = UNIT;
  static_assert(UNIT % WIDTH == 0, "pieces are whole");

  // Values as they are stored, so that tokens that wait need few registers.
  struct Packed {
    Neighbours<Element, WIDTH> at[TURNS];
  };

  int64_t channels;  // of a token
  int64_t first;     // channel
  int lane;          // of the unit's
  bool active;

  RWKV_JIT_STEP Lane(int64_t all_channels, int64_t place)
      : channels(all_channels),
        first(place / LANES * UNIT + place % LANES * WIDTH),
        lane(static_cast<int>(place % LANES)),
        active(place / LANES * UNIT < all_channels) {}

  RWKV_JIT_STEP bool has_piece(int turn) const {
    return active && (FULL || turn * LANES + lane < PIECES);
  }
  // Whether value i of this lane is a channel.
  RWKV_JIT_STEP bool has(int i) const { return has_piece(i / WIDTH); }

  RWKV_JIT_STEP Packed load(const void* from, int64_t row) const {
    Packed packed = {};
    const Element* source = static_cast<const Element*>(from) + row * channels + first;
    each<TURNS>([&](int turn) {
      if (has_piece(turn))
        packed.at[turn] =
            *reinterpret_cast<const Neighbours<Element, WIDTH>*>(source + turn * LANES * WIDTH);
    });
    return packed;
  }
  static RWKV_JIT_STEP void unpack(const Packed& packed, float (&values)[COUNT]) {
    each<COUNT>([&](int i) { values[i] = rwkv_jit::load(packed.at[i / WIDTH].at[i % WIDTH]); });
  }
  RWKV_JIT_STEP void read(const void* from, int64_t row, float (&values)[COUNT]) const {
    unpack(load(from, row), values);
  }
  RWKV_JIT_STEP void store(void* to, int64_t row, const float (&values)[COUNT]) const {
    Element* target = static_cast<Element*>(to) + row * channels + first;
    each<TURNS>([&](int turn) {
      Neighbours<Element, WIDTH> piece;
      each<WIDTH>([&](int i) { rwkv_jit::store(piece.at[i], values[turn * WIDTH + i]); });
      if (has_piece(turn))
        *reinterpret_cast<Neighbours<Element, WIDTH>*>(target + turn * LANES * WIDTH) = piece;
    });
  }

  // A parameter of each channel.
  RWKV_JIT_STEP void read_parameter(const void* from, int32_t dtype, float (&values)[COUNT]) const {
    each_part([&](int i, int64_t channel, auto& part) {
      load_mixed<Element>(from, dtype, channel, part);
      each<PART>([&](int j) { values[i + j] = part[j]; });
    });
    each<COUNT>([&](int i) { values[i] = has(i) ? values[i] : 0.0f; });
  }
  // A group's part of a sum over tokens.
  RWKV_JIT_STEP void store_part(void* to, int64_t group, const float (&values)[COUNT]) const {
    each_part([&](int i, int64_t channel, auto& part) {
      each<PART>([&](int j) { part[j] = values[i + j]; });
      store_at<float>(to, group * channels + channel, part);
    });
  }

  // The sum over a unit of what its lanes have.
  static RWKV_JIT_STEP float sum(float value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2)
      value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
  }

 private:
  // Float32 takes twice the bytes, which only so are one access.
  static constexpr int PART = WIDTH < 4 ? WIDTH : 4;

  template <typename Function>
  RWKV_JIT_STEP void each_part(const Function& f) const {
    each<COUNT / PART>([&](int at) {
      const int i = at * PART, turn = i / WIDTH;
      float part[PART];
      if (has_piece(turn)) f(i, first + turn * LANES * WIDTH + i % WIDTH, part);
    });
  }
};

template <template <typename> class Step, typename Lane, typename Schedule, typename Args>
__global__ void __launch_bounds__(GROUP_THREADS, Schedule::BLOCKS)
    step_kernel(const Args args, const int group_threads) {
  constexpr int AT_ONCE = Schedule::TOKENS;
  const int thread = blockIdx.x * GROUP_THREADS + threadIdx.x;
  const int64_t group = thread / group_threads, tokens = args.B * args.T;
  if (group >= args.G) return;  // whole warps, so that sums over lanes have all of them
  const int64_t first = group * tokens / args.G, last = (group + 1) * tokens / args.G;
  const Lane lane(args.C, thread % group_threads);
  Step<Lane> step(args, lane, first, last);
  int64_t t = first;
  for (; t + AT_ONCE <= last; t += AT_ONCE) {
    typename Step<Lane>::Token tokens_now[AT_ONCE];
    each<AT_ONCE>([&](int i) { tokens_now[i] = step.load(t + i); });
    each<AT_ONCE>([&](int i) { step.run(t + i, tokens_now[i]); });
  }
  for (; t < last; ++t) step.run(t, step.load(t));
  step.finish(group);
}

template <template <typename> class Step, typename Lane, typename Schedule, typename Args>
int launch_lanes(const Args& args) {
  const int64_t units = args.C / Lane::UNIT_CHANNELS;
  const int64_t group_threads = (units * Lane::LANES + 31) / 32 * 32;
  const int64_t blocks = (args.G * group_threads + GROUP_THREADS - 1) / GROUP_THREADS;
  if (blocks == 0) return cudaSuccess;
  step_kernel<Step, Lane, Schedule>
      <<<static_cast<unsigned>(blocks), GROUP_THREADS, 0, static_cast<cudaStream_t>(args.stream)>>>(
          args, static_cast<int>(group_threads));
  return cudaGetLastError();
}

// Takes all tokens. Returns the launcher's code.
template <template <typename> class Step, typename Element, int HEAD_SIZE, typename Schedule,
          typename Args>
int run_step(const Args& args) {
  constexpr int WIDTH = Schedule::ACCESS_BYTES / sizeof(Element);
  if constexpr (HEAD_SIZE > 0) {
    constexpr int HEAD_WIDTH = HEAD_SIZE % WIDTH == 0 ? WIDTH : 1;
    return launch_lanes<Step, Lane<Element, HEAD_SIZE, HEAD_WIDTH>, Schedule>(args);
  } else {
    return args.C % WIDTH == 0 ? launch_lanes<Step, Lane<Element, WIDTH, WIDTH>, Schedule>(args)
                               : launch_lanes<Step, Lane<Element, 1, 1>, Schedule>(args);
  }
}

// Groups' parts of a sum [G, C] in float32, and where it goes. No parts, no sum.
struct Sum {
  const void* parts;
  void* to;
  int32_t dtype;
};
template <int COUNT>
struct Sums {
  Sum at[COUNT];
};

constexpr int SUM_WARPS = 8;

// One warp for 32 channels of a sum adds every SUM_WARPS-th part, in their order.
template <typename Element, int COUNT>
__global__ void __launch_bounds__(SUM_WARPS * 32)
    sum_kernel(const Sums<COUNT> sums, const int64_t groups, const int64_t channels) {
  __shared__ float of_warps[SUM_WARPS][32];
  const Sum sum = sums.at[blockIdx.y];
  if (sum.parts == nullptr) return;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t channel = int64_t{blockIdx.x} * 32 + lane;
  float total = 0;
  if (channel < channels) {
    const float* parts = static_cast<const float*>(sum.parts) + channel;
#pragma unroll 8
    for (int64_t group = warp; group < groups; group += SUM_WARPS) total += parts[group * channels];
  }
  of_warps[warp][lane] = total;
  __syncthreads();
  if (warp > 0 || channel >= channels) return;
  for (int other = 1; other < SUM_WARPS; ++other) total += of_warps[other][lane];
  store_mixed<Element>(sum.to, sum.dtype, channel, total);
}

// The same, then adds up the parts that it left of sums over tokens.
template <template <typename> class Step, typename Element, int HEAD_SIZE, typename Schedule,
          typename Args, typename... Each>
int run_step_and_sum(const Args& args, const Each&... each_sum) {
  const int code = run_step<Step, Element, HEAD_SIZE, Schedule>(args);
  if (code != cudaSuccess || args.C == 0) return code;
  constexpr int COUNT = sizeof...(Each);
  const Sums<COUNT> sums = {each_sum...};
  const dim3 blocks(static_cast<unsigned>((args.C + 31) / 32), COUNT);
  sum_kernel<Element, COUNT>
      <<<blocks, SUM_WARPS * 32, 0, static_cast<cudaStream_t>(args.stream)>>>(sums, args.G, args.C);
  return cudaGetLastError();
}

}  // namespace rwkv_jit
