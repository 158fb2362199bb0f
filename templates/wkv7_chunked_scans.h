// The backward's shared memory, and its scans: S forward and D back through the chunks of a span.
namespace {

using namespace rwkv_jit;

// What the scans leave of a chunk for its gradients.
struct Scanned {
  StateRows d;            // D after the chunk
  Element u[N][PADDED];   // U, [value, token]
  Element dx[N][PADDED];  // dX
};

// With twice the warps that the state needs, one half takes D back through the chunks while the
// other takes S through them; then that one works out the gradients of the chunks from OTHERS on,
// as soon as D has come through each, and the first half those of the chunks before.
constexpr int GROUPS = WARPS / STATE_WARPS;
static_assert(WARPS == GROUPS * STATE_WARPS && GROUPS <= 2);
static_assert(WARPS == CHUNKS * PARTS);
constexpr int OTHERS = CHUNKS / 2, SCANNED = GROUPS == 1 ? 1 : CHUNKS;
// Numbered barriers, after those of the chunks: of a group, that S and U of all chunks are there,
// and that D and dX of a chunk are.
constexpr int GROUP_BARRIER = 1 + CHUNKS, U_BARRIER = GROUP_BARRIER + GROUPS;
constexpr int SCANNED_BARRIER = U_BARRIER + 1;
static_assert(SCANNED_BARRIER + CHUNKS <= 16);

struct Work {
  StateRows state[CHUNKS];  // before each chunk
  Scanned scanned[SCANNED];
};

struct Shared {
  Chunk chunks[CHUNKS];
  Element v[SPAN][ROW], dy[SPAN][ROW];
  Raw raw[CHUNKS];
  union {
    Partials partials[CHUNKS];  // until the chunks are prepared
    Work work;
  };
};

// The triangles' gradients take the place of K'', which then is done with.
__device__ __forceinline__ Element* triangle_of(Chunk& chunk, int which) {
  return &chunk.k[0][0] + which * TOKENS * PADDED;
}
static_assert(sizeof(Chunk::k) + sizeof(Chunk::b) >= TRIANGLES * TOKENS * PADDED * sizeof(Element),
              "they fit over K'' and B^");

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

// A block's spans of a sequence: [begin, end).
struct Segment {
  int begin, end;
};

// Where there are few heads several blocks share a sequence. Each takes D alone through the spans
// behind its own, by the same steps as the block whose spans those are, so that what comes out is
// the same however many there are. Segments become shorter towards the first one by what that
// costs, so that all take the same time.
constexpr int MOST_SEGMENTS = 8;
constexpr float PASS_COST = 0.3f;  // of D alone through a span, where its gradients cost 1

// Segment `index` of a sequence, from its end.
__device__ __forceinline__ Segment find_segment(int spans, int index, int segments) {
  float part = 1, all = 0, behind = 0, until = 0;
  for (int at = 0; at < segments; ++at, part *= 1 - PASS_COST) {
    if (at == index) behind = all;
    all += part;
    if (at == index) until = all;
  }
  const auto before = [&](float parts) {
    return spans - static_cast<int>(ceilf(static_cast<float>(spans) * (parts / all)));
  };
  return {before(until), before(behind)};
}

// U of this warp's values, from the state before the chunk.
__device__ __forceinline__ void store_u(Shared& shared, int at) {
  Scanned& to = shared.work.scanned[at % SCANNED];
  const Chunk& chunk = shared.chunks[at];
  Accumulator u[2] = {};
  OperandA left;
  OperandB right;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    load<ROW>(&shared.work.state[at][own_value()][16 * step], left);
    load_transposed<ROW>(&chunk.w[0][16 * step], right);
    add_product(u, left, right);
  }
  load_transposed<ROW>(&shared.v[at * TOKENS][own_value()], left);
  load<SOLVED>(chunk.solved[TOKENS], right);
  add_product(u, rounded(left), right);
  store_tile<PADDED>(u[0], &to.u[own_value()][0]);
  store_tile<PADDED>(u[1], &to.u[own_value()][8]);
}

// D back through one chunk, ALONE or with dV, and for the gradients D after the chunk and dX.
template <bool ALONE>
__device__ __forceinline__ void scan_backward(const Arguments& args, const Tokens& tokens,
                                              int first, Shared& shared, int at, State& d) {
  Scanned& to = shared.work.scanned[at % SCANNED];
  const Chunk& chunk = shared.chunks[at];
  Accumulator e[2] = {}, dv[2] = {}, dx[2] = {};
  OperandA dy;
  OperandB right;
  load_transposed<ROW>(&shared.dy[at * TOKENS][own_value()], dy);
  dy = rounded(dy);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const OperandA rows = to_operand(d[step][0], d[step][1]);
    if constexpr (!ALONE) store_rows(rows, &to.d[own_value()][16 * step]);
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
  store_tile<PADDED>(dx[0], &to.dx[own_value()][0]);
  store_tile<PADDED>(dx[1], &to.dx[own_value()][8]);
}

// The state through a span's chunks.
__device__ __forceinline__ void scan_span_forward(const Arguments& args, int64_t checkpoint,
                                                  Shared& shared, int chunks) {
  State state;
  load_checkpoint(args, checkpoint, state);
  store_state_rows(state, shared.work.state[0]);
  for (int at = 0; at + 1 < chunks; ++at) {
    scan_forward(shared, at, state);
    store_state_rows(state, shared.work.state[at + 1]);
  }
  __syncwarp();  // the warp's rows of the states are there
}

}  // namespace
