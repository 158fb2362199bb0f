//% include "cuda_sequences.h"
// The forward kernel of a recurrence: one block per sequence, head and group of rows. Rows of S
// need nothing of each other. They stay in registers; a stage of tokens is read, converted and
// gated once by the block and then shared. The operator's template has the vectors of a token,
// load_token and run_token.
namespace {

static_assert(L % STAGE == 0, "a checkpoint falls on the first token of a stage");
constexpr int AT_ONCE = 512 / THREADS;  // blocks that share a multiprocessor, at least

__device__ __forceinline__ void store_checkpoint(const Arguments& args, const Tile& tile,
                                                 int64_t head, int64_t place, int first_row,
                                                 const float (&state)[ROWS][LANE_COLUMNS]) {
  void* const checkpoints = States::checkpoints(args);
  if (checkpoints == nullptr) return;
  float* to = static_cast<float*>(checkpoints) + (place * args.H + head) * N * N;
  tile.write_copy(state, to + first_row * N);
}

__global__ void __launch_bounds__(THREADS) forward_kernel(const Arguments args) {
  __shared__ __align__(16) float tokens[STAGE][VECTORS][N];
  const Tile tile;
  const int group = static_cast<int>(blockIdx.x % GROUPS), first_row = first_row_of(group);
  const Work work = find_work<L, THREADS>(args, blockIdx.x / GROUPS, group == 0);
  if (work.done) return;
  const Sequence sequence = work.sequence;
  const int64_t head = work.head;
  const void* const before = States::before(args);
  void* const after = States::after(args);

  float state[ROWS][LANE_COLUMNS];
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; ++j)
      state[i][j] = before == nullptr
                        ? 0.0f
                        : load_at<StateElement>(
                              before, work.state * N * N +
                                          state_index(first_row + tile.row(i), tile.column(j)));

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

  if (after == nullptr) return;
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; ++j)
      store_at<StateElement>(
          after, work.state * N * N + state_index(first_row + tile.row(i), tile.column(j)),
          state[i][j]);
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t blocks = args->S * args->H * GROUPS;
  const Arguments own = begin_forward(*args, blocks, AT_ONCE);
  if (blocks == 0) return cudaSuccess;
  const auto stream = static_cast<cudaStream_t>(args->stream);
  forward_kernel<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(own);
  return cudaGetLastError();
}
