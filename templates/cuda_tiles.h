// How a block shares out the rows of a head.
namespace {

constexpr int WARPS = {{warps}};
constexpr int ROWS = {{rows_per_lane}};
constexpr int THREADS = WARPS * 32;
using Tile = rwkv_jit::Tile<ROWS, N>;
constexpr int BLOCK_ROWS = WARPS * Tile::WARP_ROWS;
constexpr int GROUPS = N / BLOCK_ROWS;
static_assert(GROUPS * BLOCK_ROWS == N, "groups of rows make up a head");

// A thread reads the same channels of every token.
constexpr int CHANNELS = N > THREADS ? N / THREADS : 1;

// The first row of this warp's part of a group.
__device__ __forceinline__ int first_row_of(int group) {
  return group * BLOCK_ROWS + static_cast<int>(threadIdx.x / 32) * Tile::WARP_ROWS;
}

}  // namespace
