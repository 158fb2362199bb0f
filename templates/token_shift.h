// What both ways through token_shift_mix share.
#include "rwkv_jit/walk.h"

namespace {

constexpr int USES = 6;  // r, w, k, v, a, g

// Null for a use that is not wanted.
template <typename Lane>
struct Mixes {
  using Real = typename Lane::Real;
  Real at[USES][Lane::COUNT];

  RWKV_JIT_STEP Mixes(const Arguments& args, const Lane& lane) {
    const void* const given[] = {args.x_r, args.x_w, args.x_k, args.x_v, args.x_a, args.x_g};
    const int32_t dtypes[] = {args.x_r_dtype, args.x_w_dtype, args.x_k_dtype,
                              args.x_v_dtype, args.x_a_dtype, args.x_g_dtype};
    each<USES>([&](int use) {
      each<Lane::COUNT>([&](int i) { at[use][i] = 0; });
      if (given[use] != nullptr) lane.read_parameter(given[use], dtypes[use], at[use]);
    });
  }
};

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
