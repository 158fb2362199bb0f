// A recurrence's way back: one block per sequence and head, from the last token to the first. A
// chunk is first taken forward from its checkpoint, which keeps the state before each STEP tokens
// in `states`; in a step, from its last token to its first, the state before a token is made again
// from the one kept or from that in the step's middle, so the decay is never divided by. Where a
// head has more rows than fit, groups of rows take turns, and G of those that wait lies in dstate.
// The operator's template has the vectors of a token, and load_token, load_products, find_products,
// advance_state, take_back and store_gradients.
namespace {

constexpr int BLOCKS = {{blocks}};  // of a multiprocessor
static_assert(L % STEP == 0 && STEP == 4, "a chunk is a whole number of steps with a middle");
static_assert(sizeof(Shared) <= 99 * 1024, "a block has that much on every architecture");

// G's rows of a head whose rows take turns.
template <typename Args>
__device__ __forceinline__ float* waiting_rows(const Args& args, int row) {
  if constexpr (GROUPS > 1) {
    return static_cast<float*>(args.dstate) + (int64_t{blockIdx.x} * N + row) * N;
  } else {
    return nullptr;
  }
}

// A warp's rows of the states that are kept of a chunk: the checkpoint and those before its other
// steps.
template <typename Args>
__device__ __forceinline__ float* kept_rows(const Args& args, const Chunk& chunk, int step,
                                            int first_row) {
  float* states = step == 0 ? static_cast<float*>(args.checkpoints) + chunk.checkpoint * N * N
                            : static_cast<float*>(args.states) +
                                  (int64_t{blockIdx.x} * (L / STEP) + step) * N * N;
  return states + first_row * N;
}

// Reads, converts and gates a step of tokens; those past the end change nothing.
template <bool AHEAD>
__device__ __forceinline__ void load_tokens(const Arguments& args, const Chunk& chunk, int step,
                                            bool known, float (&carry)[WIDTH<STEP>],
                                            Shared& shared) {
  for_my_channels<STEP>([&](int turn, int t, int j) {
    const int at = step * STEP + t;
    float values[VECTORS][WIDTH<STEP>];
#pragma unroll
    for (int vector = 0; vector < VECTORS; ++vector)
#pragma unroll
      for (int i = 0; i < WIDTH<STEP>; ++i) values[vector][i] = vector == D ? 1.0f : 0.0f;
    if (at < chunk.count) {
      load_token<AHEAD>(args, chunk.first + at * args.H, chunk.head, j, carry, values);
      if (known) load_products(args, int64_t{blockIdx.x} * L + at, j, values);
    }
    if (turn == 0) __syncthreads();  // the last tokens' readers are done
#pragma unroll
    for (int vector = 0; vector < (AHEAD ? AHEAD_VECTORS : VECTORS); ++vector)
      store_at<float>(shared.tokens[t][vector], j, values[vector]);
  });
  __syncthreads();
}

// Takes a chunk forward to the first token of its last step.
__device__ __forceinline__ void keep_states(const Arguments& args, const Tile& tile,
                                            const Chunk& chunk, int steps, Shared& shared) {
  if (steps == 1) return;
  for (int group = 0; group < GROUPS; ++group) {
    const int first_row = first_row_of(group);
    float state[ROWS][LANE_COLUMNS], carry[WIDTH<STEP>] = {};
    tile.read_copy(kept_rows(args, chunk, 0, first_row), state);
    for (int step = 0; step < steps - 1; ++step) {
      load_tokens<true>(args, chunk, step, false, carry, shared);
#pragma unroll 1  // more would take registers from the rest
      for (int t = 0; t < STEP; ++t) {
        float (&token)[VECTORS][N] = shared.tokens[t];
        find_products(args, tile, int64_t{blockIdx.x} * L + step * STEP + t, first_row, state,
                      token);
        advance_state(tile, token, first_row, state);
      }
      tile.write_copy(state, kept_rows(args, chunk, step + 1, first_row));
    }
  }
}

// Takes a group of rows back through a step, whose state is on its way to shared memory; so is, at
// the end, the state that comes next: the next group's or, from another step, the first one's.
__device__ __forceinline__ void run_step(const Arguments& args, const Tile& tile,
                                         const Chunk& chunk, int step, bool known, int group,
                                         float (&g)[ROWS][LANE_COLUMNS], Shared& shared) {
  const int first_row = first_row_of(group);
  float* kept = shared.state[first_row_of(0)];
  for (int t = STEP - 1; t >= 0; --t) {
    const bool last = t == STEP - 1;
    float state[ROWS][LANE_COLUMNS];
    if (t % 2 == 1) tile.finish_copy();
    tile.read_copy(kept, state);
    for (int from = last ? 0 : t - t % 2; from <= t; ++from) {
      float (&token)[VECTORS][N] = shared.tokens[from];
      if (last && from == STEP / 2) tile.write_copy(state, kept);
      if (last && !known)
        find_products(args, tile, int64_t{blockIdx.x} * L + step * STEP + from, first_row, state,
                      token);
      if (from < t) advance_state(tile, token, first_row, state);
    }
    if (t % 2 == 0) {
      const int next_group = t > 0 ? group : (group + 1) % GROUPS;
      const int next_step = t > 0 || next_group > 0 ? step : step - 1;
      if (next_step >= 0)
        tile.start_copy(kept, kept_rows(args, chunk, next_step, first_row_of(next_group)));
    }
    take_back(tile, first_row, t, group > 0, state, g, shared);
  }
}

// Takes a chunk back, once its states are kept.
__device__ __forceinline__ void run_chunk(const Arguments& args, const Tile& tile,
                                          const Chunk& chunk, int steps,
                                          float (&carry)[WIDTH<STEP>],
                                          float (&g)[ROWS][LANE_COLUMNS], Shared& shared) {
  for (int step = steps - 1; step >= 0; --step) {
    const bool known = step < steps - 1;
    load_tokens<false>(args, chunk, step, known, carry, shared);
    if (!known)
      tile.start_copy(shared.state[first_row_of(0)], kept_rows(args, chunk, step, first_row_of(0)));
    for (int group = 0; group < GROUPS; ++group) {
      float* waiting = waiting_rows(args, first_row_of(group));
      if constexpr (GROUPS > 1) tile.read_copy(waiting, g);
      run_step(args, tile, chunk, step, known, group, g, shared);
      if constexpr (GROUPS > 1) tile.write_copy(g, waiting);
    }
    __syncthreads();  // every warp's part of the sums is there
    store_gradients(args, chunk, step, shared);
  }
}

// Takes the block's head from its last token to its first.
__device__ __forceinline__ void walk_back(const Arguments& args, Shared& shared) {
  const int64_t head_index = blockIdx.x;  // s * H + head
  const Tile tile;
  const Sequence sequence = find_sequence(args, head_index / args.H, L);
  const auto place = [&](int first_row, int i, int j) {
    return head_index * N * N + state_index(first_row + tile.row(i), tile.column(j));
  };
  float g[ROWS][LANE_COLUMNS], carry[WIDTH<STEP>] = {};
  for (int group = 0; group < GROUPS; ++group) {
    const int first_row = first_row_of(group);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j)
        g[i][j] = args.dfinal_state == nullptr
                      ? 0.0f
                      : load_at<StateElement>(args.dfinal_state, place(first_row, i, j));
    if constexpr (GROUPS > 1) tile.write_copy(g, waiting_rows(args, first_row));
  }

  const int64_t tokens = sequence.end - sequence.begin;
  int chunks = static_cast<int>((tokens + L - 1) / L);
  Chunk chunk;
  chunk.head = static_cast<int>(head_index % args.H);
  chunk.count = static_cast<int>(tokens - (chunks - 1) * int64_t{L});
  chunk.first = (sequence.begin + (chunks - 1) * int64_t{L}) * args.H + chunk.head;
  chunk.checkpoint = (sequence.first_checkpoint + chunks - 1) * args.H + chunk.head;
  for (; chunks > 0; --chunks) {
    const int steps = (chunk.count + STEP - 1) / STEP;
    keep_states(args, tile, chunk, steps, shared);
    run_chunk(args, tile, chunk, steps, carry, g, shared);
    chunk.count = L;
    chunk.first -= args.H * L;
    chunk.checkpoint -= args.H;
  }

  if (args.dinitial_state == nullptr) return;
  for (int group = 0; group < GROUPS; ++group) {
    const int first_row = first_row_of(group);
    if constexpr (GROUPS > 1) tile.read_copy(waiting_rows(args, first_row), g);
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j)
        store_at<StateElement>(args.dinitial_state, place(first_row, i, j), g[i][j]);
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
