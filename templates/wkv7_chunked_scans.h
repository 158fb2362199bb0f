// The backward's shared memory, and its scans: S forward and D back through the chunks of a span.
namespace {

using namespace rwkv_jit;

// Warps that do nothing but prepare chunks, ahead of those that share the state; else all do both
// in turn, a span at a time.
constexpr int PREPARING = WARPS - STATE_WARPS;
constexpr bool APART = PREPARING > 0;
static_assert(APART ? PREPARING == PARTS : STATE_WARPS == CHUNKS * PARTS);
static_assert(CHUNKS <= 2 && ROW_WARPS == 1);
constexpr int SLOTS = APART ? 3 : CHUNKS;  // places for chunks
// Numbered barriers, but for those of sync_chunk: of the warps that share the state, and of all,
// where some are apart: that a chunk's U and dX are there, that the gradients of its triangles are,
// that a place's chunk is there, that its tensors are done with, and that all of it is.
constexpr int STATE_BARRIER = 1, VALUES_BARRIER = 2, TRIANGLES_BARRIER = 2 + WARPS / PARTS,
              FULL_BARRIER = TRIANGLES_BARRIER + 1, READ_BARRIER = FULL_BARRIER + SLOTS,
              EMPTY_BARRIER = READ_BARRIER + SLOTS;
static_assert(!APART || (EMPTY_BARRIER + SLOTS <= 16 && STATE_WARPS / PARTS >= 2));

using StateBlocks = Element[STEPS][STEPS][16 * 16];  // a state, rounded, [value step, key step]

// What a turn is about; see wkv7_chunked_turns.h.
struct Turn {
  Tokens tokens;
  int index;       // of sequence and head
  int number;      // among its turns
  int spans;       // of the sequence up to the turn's last one; 0 if it has none
  int begin;       // the turn's first token
  int checkpoint;  // of its last span, or the one that is worked on
  int hurried;     // D is handed over ahead of the last gradients
  int over;        // there is none left (not bool, whose padding would be copied, too)
};

// What else is in shared memory, where all warps prepare chunks and where some are apart.
struct InTurn {
  union {
    Partials partials[CHUNKS];  // until the chunks are prepared
    struct {
      StateBlocks state, d;  // before the chunk that is worked on, and after it
    };
  };
};
struct Apart {
  StateBlocks state, d;
  // Of the warps that prepare a chunk the first ones'; the others' lie where its v and dY come.
  std::remove_extent_t<Partials> partials[2];
  Turn ahead;         // whose chunks are being prepared
  Turn turns[SLOTS];  // those whose first chunk is in a place
  int filled[SLOTS];  // 1 where there is a chunk in it, else 0
};
struct Shared : std::conditional_t<APART, Apart, InTurn> {
  alignas(16) Chunk chunks[SLOTS];
  Element v[SLOTS * TOKENS][ROW], dy[SLOTS * TOKENS][ROW];
  Raw raw[SLOTS];
  Turn turn;
};

// Where chunk `at` of a span is, of which the last one, with which the work begins, is at `last`.
__device__ __forceinline__ int place_of(int at, int chunks, int last) {
  return APART ? (last + chunks - 1 - at) % SLOTS : at;
}

// Waits for the warps that share the state.
__device__ __forceinline__ void sync_state() {
  if constexpr (APART) {
    wait_at<STATE_WARPS * 32>(STATE_BARRIER);
  } else {
    __syncthreads();
  }
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
    load<BLOCKED>(shared.state[own_value() / 16][step], left);
    load_transposed<ROW>(&chunk.w[0][16 * step], right);
    add_product(u, left, right);
  }
  load_transposed<ROW>(&shared.v[at * TOKENS][own_value()], left);
  load<SOLVED>(chunk.solved[TOKENS], right);
  add_product(u, rounded(left), right);
}

// D back through one chunk, ALONE or with dV, and for the gradients D after the chunk and dX.
template <bool ALONE>
__device__ __forceinline__ void scan_backward(const Arguments& args, int first, Shared& shared,
                                              int at, State& d, Accumulator (&dx)[2]) {
  const Chunk& chunk = shared.chunks[at];
  Accumulator e[2] = {}, dv[2] = {};
  OperandA dy;
  OperandB right;
  load_transposed<ROW>(&shared.dy[at * TOKENS][own_value()], dy);
  dy = rounded(dy);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const OperandA rows = to_operand(d[step][0], d[step][1]);
    if constexpr (!ALONE) store<BLOCKED>(rows, shared.d[own_value() / 16][step]);
    load_transposed<ROW>(&chunk.b[0][16 * step], right);
    add_product(e, rows, right);
    if constexpr (ALONE) continue;
    load_transposed<ROW>(&chunk.k[0][16 * step], right);
    add_product(dv, rows, right);
  }
  if constexpr (!ALONE) {
    load<PADDED>(&chunk.m[0][0], right);
    add_product(dv, dy, right);
    store_values(dv, args.dv, shared.turn.tokens, first);
  }
  step_state(d, chunk, dy, chunk.r, to_operand(e[0], e[1]), chunk.w);
  if constexpr (ALONE) return;
  load<PADDED>(&chunk.qb[0][0], right);
  add_product(e, dy, right);  // dU
  load_transposed<SOLVED>(chunk.solved[0], right);
  add_product(dx, to_operand(e[0], e[1]), right);
}

// Asks for this warp's rows of a checkpoint, where they are rounded as they are needed.
__device__ __forceinline__ void fetch_checkpoint(const Arguments& args, int64_t checkpoint,
                                                 Shared& shared) {
  if constexpr (ROUNDED_CHECKPOINTS) {
    const char* const from = checkpoint_place(args.checkpoints, checkpoint);
    char* const to = reinterpret_cast<char*>(shared.state[own_value() / 16]);
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      const int place = (step * 32 + threadIdx.x % 32) * 16;
      copy_async(to + place, from + place, true);
    }
  }
}

// The state before a span's first chunk, whose rows have been asked for, or the state AFTER it to
// shared memory. The chunk is in place `at`.
template <bool AFTER>
__device__ __forceinline__ void scan_forward_to(const Arguments& args, Shared& shared, int at) {
  Element(*const rows)[16 * 16] = shared.state[own_value() / 16];
  if constexpr (ROUNDED_CHECKPOINTS) {
    copies_done();
    __syncwarp();
  }
  if constexpr (AFTER || !ROUNDED_CHECKPOINTS) {
    State state;
    if constexpr (ROUNDED_CHECKPOINTS) {
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
        OperandA block;
        load<BLOCKED>(rows[step], block);
        widen(block, state[step]);
      }
      __syncwarp();  // every lane has read them
    } else {
      load_checkpoint(args, shared.turn.checkpoint, state);
    }
    if constexpr (AFTER) scan_forward(shared, at, state);
#pragma unroll
    for (int step = 0; step < STEPS; ++step)
      store<BLOCKED>(to_operand(state[step][0], state[step][1]), rows[step]);
    __syncwarp();  // the warp's rows are there
  }
}

}  // namespace
