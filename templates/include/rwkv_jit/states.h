#pragma once
// Where a forward finds the states of its sequences. It reads initial_state and writes final_state,
// which have a row for each; for serving it advances slots of a pool, of which those that
// state_indices names are the sequences', and keeps nothing for a backward.
#include <cstdint>
#include <type_traits>

#include "rwkv_jit/layout.h"

namespace rwkv_jit {

template <typename Args, typename = void>
struct States {
  static constexpr bool IN_POOL = false;

  static RWKV_JIT_SHARED_CODE const void* before(const Args& args) { return args.initial_state; }
  static RWKV_JIT_SHARED_CODE void* after(const Args& args) { return args.final_state; }
  static RWKV_JIT_SHARED_CODE void* checkpoints(const Args& args) { return args.checkpoints; }
  static RWKV_JIT_SHARED_CODE int64_t row(const Args&, int64_t s) { return s; }
};

template <typename Args>
struct States<Args, std::void_t<decltype(Args::state_indices)>> {
  static constexpr bool IN_POOL = true;

  static RWKV_JIT_SHARED_CODE const void* before(const Args& args) { return args.state; }
  static RWKV_JIT_SHARED_CODE void* after(const Args& args) { return args.state; }
  static RWKV_JIT_SHARED_CODE void* checkpoints(const Args&) { return nullptr; }
  // The slot of sequence s; below 0 where it has none.
  static RWKV_JIT_SHARED_CODE int64_t row(const Args& args, int64_t s) {
    const int64_t slot =
        args.state_indices == nullptr ? s : static_cast<const int32_t*>(args.state_indices)[s];
    return slot < args.P ? slot : -1;
  }
};

// Calls zero(begin, end, step) with the tokens whose y is 0 as far as they are sequence s's to see
// to: its own where it has no slot, and its share of those behind the last sequence. Returns
// whether that is all there is to do, as its state stays as it is.
template <typename Args, typename Zero>
RWKV_JIT_SHARED_CODE bool only_zeros(const Args& args, int64_t s, const Sequence& sequence,
                                     int64_t row, const Zero& zero) {
  if constexpr (States<Args>::IN_POOL) {
    if (args.cu_seqlens != nullptr)
      zero(find_sequence(args, args.S - 1, 1).end + s, args.T, args.S);
    if (row < 0) zero(sequence.begin, sequence.end, int64_t{1});
    return row < 0 || sequence.begin == sequence.end;
  }
  return false;
}

}  // namespace rwkv_jit
