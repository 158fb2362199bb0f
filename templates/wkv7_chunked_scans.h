// The backward's shared memory, and its scans: S forward and D back through the chunks of a span.
namespace {

using namespace rwkv_jit;

static_assert(WARPS == STATE_WARPS && WARPS == CHUNKS * PARTS && CHUNKS <= 2);
// States that are kept of a span. Where blocks share a multiprocessor there is place for one.
constexpr int STATES = BLOCKS == 1 ? CHUNKS : 1;

struct Shared {
  Chunk chunks[CHUNKS];
  Element v[SPAN][ROW], dy[SPAN][ROW];
  Raw raw[CHUNKS];
  union {
    Partials partials[CHUNKS];  // until the chunks are prepared
    struct {
      StateRows states[STATES], d;  // before chunks, and after the one that is worked on
    };
  };
  int ticket, begin;  // of the turn: its number, and its first token
};

// The state before a chunk.
__device__ __forceinline__ StateRows& state_of(Shared& shared, int at) {
  return shared.states[at % STATES];
}

// What a chunk's gradients need takes the place of its W, R', K'' and B^, which then are done with:
// U and dX, [value, token], and the triangles' gradients.
using Values = Element[N][PADDED];
constexpr int VALUES = sizeof(Values) / sizeof(Element);
__device__ __forceinline__ Values& u_of(Chunk& chunk) {
  return *reinterpret_cast<Values*>(&chunk.w);
}
__device__ __forceinline__ Values& dx_of(Chunk& chunk) {
  return *reinterpret_cast<Values*>(&chunk.w[0][0] + VALUES);
}
__device__ __forceinline__ Element* triangle_of(Chunk& chunk, int which) {
  return &chunk.w[0][0] + 2 * VALUES + which * TOKENS * PADDED;
}
static_assert(offsetof(Chunk, total) >= sizeof(Element[2 * VALUES + TRIANGLES * TOKENS * PADDED]),
              "they fit there");

// The state through one chunk.
__device__ __forceinline__ void scan_forward(Shared& shared, int at, State& state) {
  const Chunk& chunk = shared.chunks[at];
  Accumulator u[2] = {};
  OperandA values;
  OperandB right;
  load_transposed<ROW>(&shared.v[at * TOKENS][own_value()], values);
  values = rounded(values);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    load_transposed<ROW>(&chunk.w[0][16 * step], right);
    add_product(u, to_operand(state[step][0], state[step][1]), right);
  }
  step_state(state, chunk, values, chunk.k, to_operand(u[0], u[1]), chunk.b);
}

// U of this warp's values, from the state before the chunk.
__device__ __forceinline__ void make_u(Shared& shared, int at, Accumulator (&u)[2]) {
  const Chunk& chunk = shared.chunks[at];
  OperandA left;
  OperandB right;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    load<ROW>(&state_of(shared, at)[own_value()][16 * step], left);
    load_transposed<ROW>(&chunk.w[0][16 * step], right);
    add_product(u, left, right);
  }
  load_transposed<ROW>(&shared.v[at * TOKENS][own_value()], left);
  load<SOLVED>(chunk.solved[TOKENS], right);
  add_product(u, rounded(left), right);
}

// D back through one chunk, ALONE or with dV, and for the gradients D after the chunk and dX.
template <bool ALONE>
__device__ __forceinline__ void scan_backward(const Arguments& args, const Tokens& tokens,
                                              int first, Shared& shared, int at, State& d,
                                              Accumulator (&dx)[2]) {
  const Chunk& chunk = shared.chunks[at];
  Accumulator e[2] = {}, dv[2] = {};
  OperandA dy;
  OperandB right;
  load_transposed<ROW>(&shared.dy[at * TOKENS][own_value()], dy);
  dy = rounded(dy);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const OperandA rows = to_operand(d[step][0], d[step][1]);
    if constexpr (!ALONE) store_rows(rows, &shared.d[own_value()][16 * step]);
    load_transposed<ROW>(&chunk.b[0][16 * step], right);
    add_product(e, rows, right);
    if constexpr (ALONE) continue;
    load_transposed<ROW>(&chunk.k[0][16 * step], right);
    add_product(dv, rows, right);
  }
  if constexpr (!ALONE) {
    load<PADDED>(&chunk.m[0][0], right);
    add_product(dv, dy, right);
    store_values(dv, args.dv, tokens, first);
  }
  step_state(d, chunk, dy, chunk.r, to_operand(e[0], e[1]), chunk.w);
  if constexpr (ALONE) return;
  load<PADDED>(&chunk.qb[0][0], right);
  add_product(e, dy, right);  // dU
  load_transposed<SOLVED>(chunk.solved[0], right);
  add_product(dx, to_operand(e[0], e[1]), right);
}

// The state before the span's first chunk, or its SECOND one, to shared memory: of the second one
// that before the first, too, if there is place for both.
template <bool SECOND>
__device__ __forceinline__ void scan_forward_to(const Arguments& args, int64_t checkpoint,
                                                Shared& shared) {
  State state;
  load_checkpoint(args, checkpoint, state);
  if (SECOND && STATES > 1) store_state_rows(state, state_of(shared, 0));
  if (SECOND) scan_forward(shared, 0, state);
  store_state_rows(state, state_of(shared, SECOND));
  __syncwarp();  // the warp's rows are there
}

}  // namespace
