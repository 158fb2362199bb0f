#pragma once
// A walk over the tokens of all sequences, one after another.
#include "rwkv_jit/layout.h"

namespace rwkv_jit {

template <typename Args>
struct Walk {
  const Args& args;
  int64_t s = 0;  // the sequence that one is in
  Sequence sequence = {};

  // At token t.
  RWKV_JIT_SHARED_CODE Walk(const Args& all, int64_t t) : args(all) {
    if (args.cu_seqlens == nullptr) {
      s = args.T > 0 ? t / args.T : 0;
    } else {
      int64_t beyond = args.S;  // the sequence is from s on and before this one
      while (beyond - s > 1) {
        const int64_t middle = s + (beyond - s) / 2;
        (find_sequence(args, middle, 1).begin <= t ? s : beyond) = middle;
      }
    }
    if (args.S > 0) sequence = find_sequence(args, s, 1);
  }

  // To the next token, t.
  RWKV_JIT_SHARED_CODE void to(int64_t t) {
    while (t >= sequence.end && s + 1 < args.S) sequence = find_sequence(args, ++s, 1);
  }

  // A token that no sequence has is its first and its last.
  RWKV_JIT_SHARED_CODE bool is_first(int64_t t) const { return t <= sequence.begin; }
  RWKV_JIT_SHARED_CODE bool is_last(int64_t t) const { return t + 1 >= sequence.end; }
};

}  // namespace rwkv_jit
