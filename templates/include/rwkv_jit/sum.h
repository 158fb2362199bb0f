#pragma once
// Long sums.
#include "rwkv_jit/layout.h"

namespace rwkv_jit {

// A sum over any number of tokens that is as good as one of a few: what an addition rounds away is
// given to the next one.
template <typename Value>
struct LongSum {
  Value sum = {}, rest = {};

  RWKV_JIT_SHARED_CODE void add(Value value) {
    const Value given = value - rest, next = sum + given;
    rest = (next - sum) - given;
    sum = next;
  }
};

}  // namespace rwkv_jit
