// A recurrence's way back: one block per sequence and head, from the last token to the first. A
// chunk is first taken forward from its checkpoint, which keeps the state before each STEP tokens
// in `states`; in a step, from its last token to its first, the state before a token is made again
// from the nearest one kept, so the decay is never divided by. Where a head has more rows than fit,
// groups of rows take turns, and G of those that wait lies in dstate. The operator's template has
// the vectors of a token in Shared, and load_token, load_products, find_products, advance_state,
// take_back and store_gradients.
namespace {

constexpr int BLOCKS = {{blocks}};  // of a multiprocessor
static_assert(L % STEP == 0 && STEP == 4, "a chunk is a whole number of steps with a middle");
static_assert(sizeof(Shared) <= 99 * 1024, "a block has that much on every architecture");

// G's rows of a head whose rows take turns.
template <typename Args>
__device__ __forceinline__ float* waiting_rows(const Args& args, int64_t head_index, int row) {
  if constexpr (GROUPS > 1) {
    return static_cast<float*>(args.dstate) + (head_index * N + row) * N;
  } else {
    return nullptr;
  }
}

// A chunk of a head.
struct Chunk {
  int64_t head_index, head;  // head_index: s * H + head
  int64_t first, end;        // of the chunk's tokens, and of its sequence's
  const float* checkpoint;
  float* states;  // kept before each step but the first

  __device__ __forceinline__ const float* before(int step) const {
    return step == 0 ? checkpoint : states + (step - 1) * N * N;
  }
  // Of a token among the products that are kept.
  __device__ __forceinline__ int64_t place(int t) const { return head_index * L + t; }
};

// Reads, converts and gates a step of tokens; those past the end change nothing.
__device__ __forceinline__ void load_tokens(const Arguments& args, const Chunk& chunk, int step,
                                            bool known, float (&carry)[CHANNELS], Shared& shared) {
  constexpr int VALUES = STEP * N / THREADS;
  float values[VALUES][VECTORS];
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const int at = i * THREADS + threadIdx.x, t = step * STEP + at / N, j = at % N;
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector) values[i][vector] = vector == D ? 1.0f : 0.0f;
    if (chunk.first + t < chunk.end) {
      load_token(args, chunk.first + t, chunk.head, j, carry[i % CHANNELS], values[i]);
      if (known) load_products(args, chunk.place(t), j, values[i]);
    }
  }
  __syncthreads();  // the last tokens' readers are done
#pragma unroll
  for (int i = 0; i < VALUES; ++i) {
    const int at = i * THREADS + threadIdx.x;
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector)
      shared.tokens[at / N][vector][at % N] = values[i][vector];
  }
  __syncthreads();
}

// Takes a chunk forward to the first token of its last step.
__device__ __forceinline__ void keep_states(const Arguments& args, const Tile& tile,
                                            const Chunk& chunk, int steps, Shared& shared) {
  if (steps == 1) return;
  for (int group = 0; group < GROUPS; ++group) {
    const int first_row = first_row_of(group);
    float state[ROWS][LANE_COLUMNS], carry[CHANNELS] = {};
    tile.read(chunk.checkpoint + first_row * N, state);
    for (int step = 0; step < steps - 1; ++step) {
      load_tokens(args, chunk, step, false, carry, shared);
      for (int t = 0; t < STEP; ++t) {
        float (&token)[VECTORS][N] = shared.tokens[t];
        find_products(args, tile, chunk.place(step * STEP + t), first_row, state, token);
        advance_state(tile, token, first_row, state);
      }
      tile.write(state, chunk.states + (step * N + first_row) * N);
    }
  }
}

// Takes a group of rows back through a step.
__device__ __forceinline__ void run_step(const Arguments& args, const Tile& tile,
                                         const Chunk& chunk, int step, bool known, int group,
                                         float (&g)[ROWS][LANE_COLUMNS], Shared& shared) {
  const int first_row = first_row_of(group);
  const float* before = chunk.before(step) + first_row * N;
  float* middle = shared.middle[first_row_of(0)];
  for (int t = STEP - 1; t >= 0; --t) {
    const bool last = t == STEP - 1;
    float state[ROWS][LANE_COLUMNS];
    if (t == STEP / 2) {
      tile.read(middle, state);
    } else {
      tile.read(before, state);
    }
    for (int from = last ? 0 : t - t % 2; from <= t; ++from) {
      float (&token)[VECTORS][N] = shared.tokens[from];
      if (last && from == STEP / 2) tile.write(state, middle);
      if (last && !known)
        find_products(args, tile, chunk.place(step * STEP + from), first_row, state, token);
      if (from < t) advance_state(tile, token, first_row, state);
    }
    const int64_t token = chunk.first + step * STEP + t;
    take_back(args, tile, (token * args.H + chunk.head) * N, token < chunk.end, first_row, t,
              group > 0, state, g, shared);
  }
}

// Takes a head from its last token to its first. head_index: s * H + head.
__device__ __forceinline__ void walk_back(const Arguments& args, int64_t head_index,
                                          Shared& shared) {
  const Tile tile;
  const Sequence sequence = find_sequence(args, head_index / args.H, L);
  float g[ROWS][LANE_COLUMNS], carry[CHANNELS] = {};
  for (int group = 0; group < GROUPS; ++group) {
    const int first_row = first_row_of(group);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j)
        g[i][j] = args.dfinal_state == nullptr
                      ? 0.0f
                      : load_at<StateElement>(
                            args.dfinal_state,
                            head_index * N * N + state_index(first_row + tile.row(i), tile.column(j)));
    if constexpr (GROUPS > 1) tile.write(g, waiting_rows(args, head_index, first_row));
  }

  Chunk chunk;
  chunk.head_index = head_index, chunk.head = head_index % args.H, chunk.end = sequence.end;
  chunk.states = static_cast<float*>(args.states) + head_index * (L / STEP) * N * N;
  const int64_t chunks = (sequence.end - sequence.begin + L - 1) / L;
  for (int64_t at = chunks - 1; at >= 0; --at) {
    chunk.first = sequence.begin + at * L;
    chunk.checkpoint = static_cast<const float*>(args.checkpoints) +
                       ((sequence.first_checkpoint + at) * args.H + chunk.head) * N * N;
    const int64_t count = min(sequence.end - chunk.first, static_cast<int64_t>(L));
    const int steps = static_cast<int>(count + STEP - 1) / STEP;
    keep_states(args, tile, chunk, steps, shared);
    for (int step = steps - 1; step >= 0; --step) {
      const bool known = step < steps - 1;
      load_tokens(args, chunk, step, known, carry, shared);
      for (int group = 0; group < GROUPS; ++group) {
        float* waiting = waiting_rows(args, head_index, first_row_of(group));
        if constexpr (GROUPS > 1) tile.read(waiting, g);
        run_step(args, tile, chunk, step, known, group, g, shared);
        if constexpr (GROUPS > 1) tile.write(g, waiting);
      }
      store_gradients(args, chunk.first + step * STEP, chunk.end, chunk.head, shared);
    }
  }

  if (args.dinitial_state == nullptr) return;
  for (int group = 0; group < GROUPS; ++group) {
    const int first_row = first_row_of(group);
    if constexpr (GROUPS > 1) tile.read(waiting_rows(args, head_index, first_row), g);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j)
        store_at<StateElement>(
            args.dinitial_state,
            head_index * N * N + state_index(first_row + tile.row(i), tile.column(j)), g[i][j]);
  }
}

template <typename Kernel>
cudaError_t launch_heads(const Arguments& args, const Kernel& kernel) {
  const int64_t blocks = args.S * args.H;
  if (blocks == 0) return cudaSuccess;
  const int bytes = sizeof(Shared);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  kernel<<<static_cast<unsigned>(blocks), THREADS, bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace
