// How a chunk of wkv7 changes the state, and the outputs that come of it.
namespace {

using namespace rwkv_jit;

// state <- state diag(P_L) + left_a right_a + left_b right_b.
__device__ __forceinline__ void step_state(State& state, const Chunk& chunk, const OperandA& left_a,
                                           const Element (&right_a)[TOKENS][ROW],
                                           const OperandA& left_b,
                                           const Element (&right_b)[TOKENS][ROW]) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    decay_keys(state[step], &chunk.total[16 * step]);
    OperandB right;
    load<ROW>(&right_a[0][16 * step], right);
    add_product(state[step], left_a, right);
    load<ROW>(&right_b[0][16 * step], right);
    add_product(state[step], left_b, right);
  }
}

// Writes this warp's sixteen values, [value, token], of a chunk to a tensor.
__device__ __forceinline__ void store_values(const Accumulator (&values)[2], void* to,
                                             const Tokens& tokens, int first) {
  const int token = first + threadIdx.x % 32 / 4;
  const OperandB rows = to_second(to_operand<stored>(values[0], values[1]));
  Element* place = static_cast<Element*>(to) + tokens.at(token) + own_value() + threadIdx.x % 4 * 2;
  // Not by store_row: what takes the state through the chunks would wait for its exchange.
#pragma unroll
  for (int part = 0; part < 4; ++part)
    if (token + part / 2 * 8 < tokens.count)
      *reinterpret_cast<Packed*>(place + part / 2 * 8 * tokens.stride + part % 2 * 8) =
          rows.at[part];
}

}  // namespace
