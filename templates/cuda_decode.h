// The decode kernel of a recurrence: a few tokens a sequence, on a pool of states that is advanced
// in place. A block has some rows of one head, which it reads and writes once; they wait for
// nothing but the slot. How many rows a block has changes nothing in any of them. The operator's
// template has the vectors of a token, load_token, run_token and skip_value.
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

// What one access to memory takes of a row.
using Keys = Neighbours<Pair<StateElement>, Lanes::KEYS / 2>;

// A lane's rows, the first of whose values lies at `from`, in the order of memory.
template <int ROWS>
__device__ __forceinline__ void read_state(const StateElement* from,
                                           LaneRows<StateElement, ROWS>& state) {
  if constexpr (STATE_IS_KV) {
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; j += 2) {
      float left[ROWS], right[ROWS];
      load_at<StateElement>(from, state_index(0, Lanes::past(j)), left);
      load_at<StateElement>(from, state_index(0, Lanes::past(j + 1)), right);
#pragma unroll
      for (int i = 0; i < ROWS; ++i)
        store_pair<StateElement>(state.pairs[i][j / 2], {left[i], right[i]});
    }
  } else {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; j += Lanes::KEYS) {
        const Keys keys = *reinterpret_cast<const Keys*>(from + state_index(i, Lanes::past(j)));
#pragma unroll
        for (int x = 0; x < Lanes::KEYS / 2; ++x) state.pairs[i][j / 2 + x] = keys.at[x];
      }
  }
}

template <int ROWS>
__device__ __forceinline__ void write_state(const LaneRows<StateElement, ROWS>& state,
                                            StateElement* to) {
  if constexpr (STATE_IS_KV) {
#pragma unroll
    for (int j = 0; j < LANE_COLUMNS; j += 2) {
      float left[ROWS], right[ROWS];
#pragma unroll
      for (int i = 0; i < ROWS; ++i) {
        const float2 two = load_pair<StateElement>(state.pairs[i][j / 2]);
        left[i] = two.x, right[i] = two.y;
      }
      store_at<StateElement>(to, state_index(0, Lanes::past(j)), left);
      store_at<StateElement>(to, state_index(0, Lanes::past(j + 1)), right);
    }
  } else {
#pragma unroll
    for (int i = 0; i < ROWS; ++i)
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; j += Lanes::KEYS) {
        Keys keys;
#pragma unroll
        for (int x = 0; x < Lanes::KEYS / 2; ++x) keys.at[x] = state.pairs[i][j / 2 + x];
        *reinterpret_cast<Keys*>(to + state_index(i, Lanes::past(j))) = keys;
      }
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
        skip_value(args, ((first_token + t) * heads + head) * N + first_row + i);
    return;
  }
  StateElement* const part = static_cast<StateElement*>(args.state) +
                             (slot * heads + head) * N * N + state_index(first_row, tile.column(0));
  LaneRows<StateElement, ROWS> state;
  read_state(part, state);

  for (int64_t first = 0; first < length; first += STAGE) {
    const int count = ONE ? 1 : static_cast<int>(min(length - first, int64_t{STAGE}));
    if (first > 0) __syncthreads();  // the last stage's readers are done
    for (int at = threadIdx.x; at < count * N; at += THREADS)
      load_token(args, first_token + first + at / N, head, at % N, blockIdx.x % GROUPS<ROWS> == 0,
                 tokens[at / N]);
    __syncthreads();
    for (int t = 0; t < count; ++t) {
      float y[ROWS];
      run_token(tile, tokens[t], first_row, state, y);
      if (tile.column_lane == 0)
        store_at<Element>(args.y, ((first_token + first + t) * heads + head) * N + first_row, y);
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
