// The mixes x_j of each use of a token, and what is made with them; those that are not wanted are
// null. Arguments have x_j and, forward, its result, or backward that one's gradient and its parts.

namespace {

constexpr int USES = 6;  // r, w, k, v, a, g

template <typename Lane>
struct Mixes {
  using Real = typename Lane::Real;
  static constexpr int COUNT = Lane::COUNT;
  Real at[USES][COUNT];

  RWKV_JIT_STEP Mixes(const Arguments& args, const Lane& lane) {
    const void* const given[] = {args.x_r, args.x_w, args.x_k, args.x_v, args.x_a, args.x_g};
    const int32_t dtypes[] = {args.x_r_dtype, args.x_w_dtype, args.x_k_dtype,
                              args.x_v_dtype, args.x_a_dtype, args.x_g_dtype};
    each<USES>([&](int use) {
      each<COUNT>([&](int i) { at[use][i] = 0; });
      if (given[use] != nullptr) lane.read_parameter(given[use], dtypes[use], at[use]);
    });
  }

  // x + delta * x_j.
  template <typename Args>
  RWKV_JIT_STEP void store(const Args& args, const Lane& lane, int64_t t, const Real (&x)[COUNT],
                           const Real (&delta)[COUNT]) const {
    void* const outputs[] = {args.r, args.w, args.k, args.v, args.a, args.g};
    each<USES>([&](int use) {
      if (outputs[use] == nullptr) return;
      Real y[COUNT];
      each<COUNT>([&](int i) { y[i] = x[i] + delta[i] * at[use][i]; });
      lane.store(outputs[use], t, y);
    });
  }
};

template <typename Args>
RWKV_JIT_STEP const void* gradient(const Args& args, int use) {
  const void* const all[] = {args.dr, args.dw, args.dk, args.dv, args.da, args.dg};
  return all[use];
}

// The gradients of what was made of token t, zeros where there are none. `instead` is any tensor of
// tokens: without a branch, which would have each load wait for the one before it.
template <typename Lane, typename Args>
RWKV_JIT_STEP void load_gradients(const Args& args, const Lane& lane, const void* instead,
                                  int64_t t, typename Lane::Packed (&all)[USES]) {
  using Packed = typename Lane::Packed;
  each<USES>([&](int use) {
    const bool given = gradient(args, use) != nullptr;
    const Packed dy = lane.load(given ? gradient(args, use) : instead, t);
    all[use] = given ? dy : Packed{};
  });
}

template <typename Lane, typename Args>
RWKV_JIT_STEP void store_parts(const Args& args, const Lane& lane, int64_t group,
                               const typename Lane::Real (&sums)[USES][Lane::COUNT]) {
  void* const parts[] = {args.x_r_parts, args.x_w_parts, args.x_k_parts,
                         args.x_v_parts, args.x_a_parts, args.x_g_parts};
  each<USES>([&](int use) {
    if (parts[use] != nullptr) lane.store_part(parts[use], group, sums[use]);
  });
}

// Takes all tokens, and adds up the parts.
template <template <typename> class Step, typename Args>
int run_step_and_sum_parts(const Args& args) {
  return run_step_and_sum<Step, Element, HEAD_SIZE, Schedule>(
      args, Sum{args.x_r_parts, args.dx_r, args.dx_r_dtype},
      Sum{args.x_w_parts, args.dx_w, args.dx_w_dtype},
      Sum{args.x_k_parts, args.dx_k, args.dx_k_dtype},
      Sum{args.x_v_parts, args.dx_v, args.dx_v_dtype},
      Sum{args.x_a_parts, args.dx_a, args.dx_a_dtype},
      Sum{args.x_g_parts, args.dx_g, args.dx_g_dtype});
}

}  // namespace
