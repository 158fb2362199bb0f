// The state of wkv6 through a span's chunks.
namespace {

using namespace rwkv_jit;

constexpr int PART_STEPS = STEPS / PARTS;  // of sixteen channels that a warp prepares
static_assert(PART_STEPS * PARTS == STEPS && WARPS == CHUNKS * PARTS);

// state <- state diag(P_L) + left right, for this warp's part.
__device__ __forceinline__ void step_state(State& state, const Chunk& chunk,
                                           const Element (*left)[ROW],
                                           const Element (&right)[TOKENS][ROW]) {
  OperandA values;
  load_transposed<ROW>(&left[0][own_value()], values);
#pragma unroll
  for (int step = 0; step < KEY_STEPS; ++step) {
    const int key = own_key() + 16 * step;
    OperandB keys;
    decay_keys(state[step], &chunk.total[key]);
    load<ROW>(&right[0][key], keys);
    add_product(state[step], values, keys);
  }
}

// The first of them.
__device__ __forceinline__ int own_channel() { return threadIdx.x / 32 % PARTS * PART_STEPS * 16; }

}  // namespace
