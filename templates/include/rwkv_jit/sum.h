#pragma once
// Long sums.
#include "rwkv_jit/layout.h"

namespace rwkv_jit {

// Adds to a sum of any number of terms, which so stays as good as one of a few: `rest` carries what
// an addition rounds away to the next one. Both begin at zero.
template <typename Value>
RWKV_JIT_SHARED_CODE void add_long(Value term, Value& sum, Value& rest) {
  const Value given = term - rest, next = sum + given;
  rest = (next - sum) - given;
  sum = next;
}

}  // namespace rwkv_jit
