// The decode kernel of a recurrence: a few tokens a sequence, on a pool of states that is advanced
// in place. A block has some rows of one head, which it reads and writes once; they wait for
// nothing but the slot. How many rows a block has changes nothing in any of them. The operator's
// template has the vectors of a token, load_token and run_token.
namespace {

constexpr int STAGE = {{stage_tokens}};  // tokens that a block has at once
constexpr int WARPS = {{warps}};
constexpr int THREADS = WARPS * 32;
constexpr int BLOCKS = {{blocks}};  // that share a multiprocessor at one token, at least
// Rows of a lane, and of a lane where there are few heads: so few blocks leave a GPU idle.
constexpr int MANY_ROWS = {{rows_per_lane}}, FEW_ROWS = {{few_rows_per_lane}};
constexpr int64_t FEW_BLOCKS = 264;
// Keys of a lane lie so that 16 bytes of a row are one access.
using Lanes = RowLanes<N, STATE_IS_KV || sizeof(StateElement) == 4 ? 4 : 8>;

template <int ROWS>
constexpr int GROUPS = N / (WARPS * Lanes::ROW_LANES * ROWS);  // blocks of a head

// Runs over a lane's part of a state in the order of its memory: work(at, i, j), with `at` how far
// the neighbours i, j and on lie behind the part's first value.
template <int ROWS, typename Work>
__device__ __forceinline__ void for_neighbours(const Work& work) {
#pragma unroll
  for (int i = 0; i < (STATE_IS_KV ? 1 : ROWS); ++i)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; j += STATE_IS_KV ? 1 : Lanes::KEYS)
      work(static_cast<int>(state_index(i, Lanes::past(j))), i, j);
}

template <int ROWS>
constexpr int NEIGHBOURS = STATE_IS_KV ? ROWS : Lanes::KEYS;

// A lane's rows, the first of whose values lies at `from`.
template <int ROWS>
__device__ __forceinline__ void read_state(const StateElement* from,
                                           float (&state)[ROWS][LANE_COLUMNS]) {
  for_neighbours<ROWS>([&](int at, int i, int j) {
    float values[NEIGHBOURS<ROWS>];
    load_at<StateElement>(from, at, values);
#pragma unroll
    for (int x = 0; x < NEIGHBOURS<ROWS>; ++x)
      (STATE_IS_KV ? state[x][j] : state[i][j + x]) = values[x];
  });
}

template <int ROWS>
__device__ __forceinline__ void write_state(const float (&state)[ROWS][LANE_COLUMNS],
                                            StateElement* to) {
  for_neighbours<ROWS>([&](int at, int i, int j) {
    float values[NEIGHBOURS<ROWS>];
#pragma unroll
    for (int x = 0; x < NEIGHBOURS<ROWS>; ++x)
      values[x] = STATE_IS_KV ? state[x][j] : state[i][j + x];
    store_at<StateElement>(to, at, values);
  });
}

// Between two tokens of one call the state is rounded as between two calls, so that both give the
// same bits.
template <int ROWS>
__device__ __forceinline__ void round_state(float (&state)[ROWS][LANE_COLUMNS]) {
#pragma unroll
  for (int i = 0; i < ROWS; ++i)
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; ++j) {
      StateElement stored;
      store(stored, state[i][j]);
      state[i][j] = load(stored);
    }
}

// ONE: there is one token, as there mostly is.
template <int ROWS, bool ONE>
__global__ void __launch_bounds__(THREADS, ONE ? BLOCKS : 1) decode_kernel(const Arguments args) {
  __shared__ __align__(16) float tokens[ONE ? 1 : STAGE][VECTORS][N];
  const Lanes tile;
  const unsigned heads = static_cast<unsigned>(args.H), item = blockIdx.x / GROUPS<ROWS>;
  const unsigned b = item / heads, head = item % heads;
  const int first_row = static_cast<int>(blockIdx.x % GROUPS<ROWS> * WARPS + threadIdx.x / 32) *
                            Lanes::ROW_LANES * ROWS +
                        tile.row_lane * ROWS;
  const int64_t length = ONE ? 1 : args.T, first_token = b * length;

  const int64_t slot =
      args.state_indices == nullptr ? b : static_cast<const int32_t*>(args.state_indices)[b];
  if (slot < 0 || slot >= args.P) {
    for (int64_t t = 0; t < length; ++t)
      for (int i = tile.column_lane; i < ROWS; i += Lanes::COLUMN_LANES)
        store_at<Element>(args.y, ((first_token + t) * heads + head) * N + first_row + i, 0.0f);
    return;
  }
  StateElement* const part = static_cast<StateElement*>(args.state) +
                             (slot * heads + head) * N * N + state_index(first_row, tile.column(0));
  float state[ROWS][LANE_COLUMNS];
  read_state(part, state);

  for (int64_t first = 0; first < length; first += STAGE) {
    const int count = ONE ? 1 : static_cast<int>(min(length - first, int64_t{STAGE}));
    if (first > 0) __syncthreads();  // the last stage's readers are done
    for (int at = threadIdx.x; at < count * N; at += THREADS)
      load_token(args, first_token + first + at / N, head, at % N, tokens[at / N]);
    __syncthreads();
    for (int t = 0; t < count; ++t) {
      float y[ROWS];
      run_token<4>(tile, tokens[t], first_row, state, y);
      if (sizeof(StateElement) < sizeof(float) && first + t + 1 < length) round_state(state);
      if (tile.column_lane == 0) {
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
          store_at<Element>(args.y, ((first_token + first + t) * heads + head) * N + first_row + i,
                            y[i]);
      }
    }
  }
  write_state(state, part);
}

template <int ROWS>
cudaError_t launch(const Arguments& args) {
  const int64_t blocks = args.B * args.H * GROUPS<ROWS>;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  const auto kernel = args.T == 1 ? decode_kernel<ROWS, true> : decode_kernel<ROWS, false>;
  kernel<<<static_cast<unsigned>(blocks), THREADS, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const int64_t blocks = args->B * args->H * GROUPS<MANY_ROWS>;
  if (blocks == 0 || args->T == 0) return cudaSuccess;
  return blocks < FEW_BLOCKS ? launch<FEW_ROWS>(*args) : launch<MANY_ROWS>(*args);
}
