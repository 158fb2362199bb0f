#pragma once
// Steps around the recurrence: groups of tokens, taken by one thread each.
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "rwkv_jit/cpu/element.h"
#include "rwkv_jit/cpu/parallel.h"
#include "rwkv_jit/layout.h"

#define RWKV_JIT_STEP inline

namespace rwkv_jit {

constexpr int UNIT_CHANNELS_AT_ONCE = 64;  // where there are no heads

// Calls f(0) ... f(COUNT - 1).
template <int COUNT, typename Function>
inline void each(const Function& f) {
  for (int i = 0; i < COUNT; ++i) f(i);
}

template <typename Real>
inline Real exponential(Real x) {
  return std::exp(x);
}
template <typename Real>
inline Real inverse(Real x) {
  return 1 / x;
}
template <typename Real>
inline Real square_root(Real x) {
  return std::sqrt(x);
}

// UNIT channels side by side: a head, or some.
template <typename Stored, int UNIT>
struct Lane {
  using Element = Stored;
  using Real = typename RealOf<Element>::type;
  static constexpr int COUNT = UNIT;

  struct Packed {
    Element at[COUNT];
  };

  int64_t channels;  // of a token
  int64_t first;

  static constexpr bool has(int) { return true; }

  Packed load(const void* from, int64_t row) const {
    Packed packed;
    std::copy_n(static_cast<const Element*>(from) + row * channels + first, COUNT, packed.at);
    return packed;
  }
  static void unpack(const Packed& packed, Real (&values)[COUNT]) {
    for (int i = 0; i < COUNT; ++i) values[i] = rwkv_jit::load(packed.at[i]);
  }
  void read(const void* from, int64_t row, Real (&values)[COUNT]) const {
    unpack(load(from, row), values);
  }
  void store(void* to, int64_t row, const Real (&values)[COUNT]) const {
    Element* target = static_cast<Element*>(to) + row * channels + first;
    for (int i = 0; i < COUNT; ++i) rwkv_jit::store(target[i], values[i]);
  }

  // A parameter of each channel.
  void read_parameter(const void* from, int32_t dtype, Real (&values)[COUNT]) const {
    if (dtype == FP32) {
      std::copy_n(static_cast<const float*>(from) + first, COUNT, values);
    } else {
      read(from, 0, values);
    }
  }
  // A group's part of a sum over tokens.
  void store_part(void* to, int64_t group, const Real (&values)[COUNT]) const {
    std::copy_n(values, COUNT, static_cast<Real*>(to) + group * channels + first);
  }

  // The sum over the unit, which one lane has alone.
  static Real sum(Real value) { return value; }
};

template <template <typename> class Step, typename Lane, typename Args>
void run_group(const Args& args, int64_t group, int64_t channel) {
  const int64_t tokens = args.B * args.T;
  const int64_t first = group * tokens / args.G, last = (group + 1) * tokens / args.G;
  const Lane lane = {args.C, channel};
  Step<Lane> step(args, lane, first, last);
  for (int64_t t = first; t < last; ++t) step.run(t, step.load(t));
  step.finish(group);
}

// Takes all tokens. Returns the launcher's code.
template <template <typename> class Step, typename Element, int HEAD_SIZE, typename, typename Args>
int run_step(const Args& args) {
  constexpr int UNIT = HEAD_SIZE > 0 ? HEAD_SIZE : UNIT_CHANNELS_AT_ONCE;
  const double work = 10.0 * args.C * (double(args.B) * args.T / args.G + 1);
  const int64_t threads = useful_threads(args.threads, args.G, work);
  parallel_for(args.G, threads, [&](int64_t group, int64_t) {
    int64_t channel = 0;
    for (; channel + UNIT <= args.C; channel += UNIT)
      run_group<Step, Lane<Element, UNIT>>(args, group, channel);
    if constexpr (HEAD_SIZE == 0)
      for (; channel < args.C; ++channel) run_group<Step, Lane<Element, 1>>(args, group, channel);
  });
  return 0;
}

// Groups' parts of a sum [G, C] and where it goes. No parts, no sum.
struct Sum {
  const void* parts;
  void* to;
  int32_t dtype;
};

template <typename Element, typename Args>
void add_parts(const Args& args, const Sum& sum) {
  using Real = typename RealOf<Element>::type;
  if (sum.parts == nullptr) return;
  const Real* parts = static_cast<const Real*>(sum.parts);
  for (int64_t first = 0; first < args.C; first += UNIT_CHANNELS_AT_ONCE) {
    const int64_t count = std::min<int64_t>(UNIT_CHANNELS_AT_ONCE, args.C - first);
    Real total[UNIT_CHANNELS_AT_ONCE] = {};
    for (int64_t group = 0; group < args.G; ++group)
      for (int64_t i = 0; i < count; ++i) total[i] += parts[group * args.C + first + i];
    for (int64_t i = 0; i < count; ++i) {
      if (sum.dtype == FP32) {
        store(static_cast<float*>(sum.to)[first + i], total[i]);
      } else {
        store(static_cast<Element*>(sum.to)[first + i], total[i]);
      }
    }
  }
}

// The same, then adds up the parts that it left of sums over tokens.
template <template <typename> class Step, typename Element, int HEAD_SIZE, typename Schedule,
          typename Args, typename... Each>
int run_step_and_sum(const Args& args, const Each&... sums) {
  const int code = run_step<Step, Element, HEAD_SIZE, Schedule>(args);
  (add_parts<Element>(args, sums), ...);
  return code;
}

}  // namespace rwkv_jit
