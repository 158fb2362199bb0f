// How a block shares out the rows of a head.
namespace {

constexpr int WARPS = {{warps}};
constexpr int ROWS = {{rows_per_lane}};
constexpr int THREADS = WARPS * 32;
using Tile = rwkv_jit::Tile<ROWS, N>;
constexpr int BLOCK_ROWS = WARPS * Tile::WARP_ROWS;
constexpr int GROUPS = N / BLOCK_ROWS;
static_assert(GROUPS * BLOCK_ROWS == N, "groups of rows make up a head");

// A chunk of a head: its first token's row of B * T * H, from which the others' are H apart, how
// many they are, and the place of the state before them.
struct Chunk {
  int64_t first, checkpoint;
  int head, count;
};

// How many channels of a token a thread reads at once; they are the same ones of every token.
template <int TOKENS>
constexpr int WIDTH = TOKENS * N / THREADS < 4 ? TOKENS * N / THREADS : 4;

// The first row of this warp's part of a group.
__device__ __forceinline__ int first_row_of(int group) {
  return group * BLOCK_ROWS + static_cast<int>(threadIdx.x / 32) * Tile::WARP_ROWS;
}

// Calls `use` with the tokens of a stage and the channels that this thread reads.
template <int TOKENS, typename Use>
__device__ __forceinline__ void for_my_channels(const Use& use) {
  static_assert(THREADS * WIDTH<TOKENS> % N == 0, "a thread keeps its channels");
#pragma unroll
  for (int i = 0; i < TOKENS * N / THREADS / WIDTH<TOKENS>; ++i) {
    const int at = (i * THREADS + static_cast<int>(threadIdx.x)) * WIDTH<TOKENS>;
    use(i, at / N, at % N);
  }
}

}  // namespace
