// What both ways through token_shift_mix share.
#include "rwkv_jit/walk.h"

namespace {

// The token before token t, where t is the first of its sequence.
template <typename Lane, typename Real>
RWKV_JIT_STEP void read_initial(const Arguments& args, const Lane& lane, int64_t s,
                                Real (&before)[Lane::COUNT]) {
  each<Lane::COUNT>([&](int i) { before[i] = 0; });
  if (args.initial_state != nullptr && s < args.S) lane.read(args.initial_state, s, before);
}

// Calls f(s) for each sequence without tokens.
template <typename Function>
RWKV_JIT_STEP void each_empty(const Arguments& args, const Function& f) {
  if (args.cu_seqlens == nullptr && args.T > 0) return;
  for (int64_t s = 0; s < args.S; ++s) {
    const Sequence sequence = find_sequence(args, s, 1);
    if (sequence.begin == sequence.end) f(s);
  }
}

}  // namespace
