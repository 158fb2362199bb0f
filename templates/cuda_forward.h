// The forward kernel of a recurrence: one block per sequence, head and group of rows. Rows of S
// need nothing of each other. They stay in registers; a stage of tokens is read, converted and
// gated once by the block and then shared. The operator's template has the vectors of a token,
// load_token and run_token.
namespace {

static_assert(L % STAGE == 0, "a checkpoint falls on the first token of a stage");

__device__ __forceinline__ void store_checkpoint(const Arguments& args, const Tile& tile,
                                                 int64_t head, int64_t place, int first_row,
                                                 const float (&state)[ROWS][LANE_COLUMNS]) {
  if (args.checkpoints == nullptr) return;
  float* to = static_cast<float*>(args.checkpoints) + (place * args.H + head) * N * N;
  tile.write_copy(state, to + first_row * N);
}

__global__ void __launch_bounds__(THREADS) forward_kernel(const Arguments args) {
  __shared__ __align__(16) float tokens[STAGE][VECTORS][N];
  const Tile tile;
  const int64_t head_index = blockIdx.x / GROUPS;  // s * H + head
  const int64_t head = head_index % args.H;
  const int first_row = first_row_of(static_cast<int>(blockIdx.x % GROUPS));
  const Sequence sequence = find_sequence(args, head_index / args.H, L);

  float state[ROWS][LANE_COLUMNS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; ++j)
      state[i][j] =
          args.initial_state == nullptr
              ? 0.0f
              : load_at<StateElement>(
                    args.initial_state,
                    head_index * N * N + state_index(first_row + tile.row(i), tile.column(j)));

  float carry[WIDTH<STAGE>] = {};
  int64_t checkpoint = sequence.first_checkpoint;
  for (int64_t first = sequence.begin; first < sequence.end; first += STAGE) {
    const int count = static_cast<int>(min(sequence.end - first, static_cast<int64_t>(STAGE)));
    if ((first - sequence.begin) % L == 0)
      store_checkpoint(args, tile, head, checkpoint++, first_row, state);
    __syncthreads();  // the last stage's readers are done
    for_my_channels<STAGE>([&](int, int t, int j) {
      if (t >= count) return;
      float values[VECTORS][WIDTH<STAGE>];
      load_token(args, first + t, head, j, carry, values);
#pragma unroll
      for (int vector = 0; vector < VECTORS; ++vector)
        store_at<float>(tokens[t][vector], j, values[vector]);
    });
    __syncthreads();
    for (int t = 0; t < count; ++t) {
      float y[ROWS];
      run_token(tile, tokens[t], first_row, state, y);
      if (tile.has_rows()) {
        const int64_t to = ((first + t) * args.H + head) * N + first_row;
#pragma unroll
        for (int i = 0; i < Tile::PAIR; ++i) store_at<Element>(args.y, to + tile.row(i), y[i]);
      }
    }
  }

  // A place that no chunk needs is written all the same, so that no output is left undefined.
  if (checkpoint < sequence.first_checkpoint + sequence.checkpoints)
    store_checkpoint(args, tile, head, checkpoint, first_row, state);

  if (args.final_state == nullptr) return;
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; ++j)
      store_at<StateElement>(
          args.final_state,
          head_index * N * N + state_index(first_row + tile.row(i), tile.column(j)), state[i][j]);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t blocks = args->S * args->H * GROUPS;
  if (blocks == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(args->stream);
  forward_kernel<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(*args);
  return cudaGetLastError();
}
