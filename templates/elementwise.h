// What each step around the recurrence has. Its template goes on with a Step<Lane>: what a lane
// does with its channels of a group of tokens, the same on every platform:
//   Step(args, lane, first, last)   before the tokens from `first` to `last`
//   Token load(t)                   what it reads of a token; several are read before the first run
//   void run(t, token)              the tokens in their order
//   void finish(group)              after them
// A lane that has no channels does the same, on zeros.
//% include "launcher.h"
#include "rwkv_jit/{{platform}}/channels.h"
#include "rwkv_jit/{{platform}}/error.h"

namespace {

using namespace rwkv_jit;

using Element = rwkv_jit::{{dtype}};
constexpr int HEAD_SIZE = {{head_size}};  // 0 where there are no heads
// On a GPU: tokens that a lane reads before it works on them, bytes of each access to memory, and
// blocks that share a multiprocessor at least.
struct Schedule {
  static constexpr int TOKENS = {{tokens_at_once}}, ACCESS_BYTES = {{access_bytes}};
  static constexpr int BLOCKS = {{blocks}};
};

}  // namespace
