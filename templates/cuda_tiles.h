// How a block shares out the rows of a head.
namespace {

constexpr int WARPS = {{warps}};
constexpr int ROWS = {{rows_per_lane}};
constexpr int THREADS = WARPS * 32;
constexpr int WARP_ROWS = rwkv_jit::Tile<N>::ROW_LANES * ROWS;
constexpr int BLOCK_ROWS = WARPS * WARP_ROWS;
constexpr int GROUPS = N / BLOCK_ROWS;
static_assert(GROUPS * BLOCK_ROWS == N, "groups of rows make up a head");

}  // namespace
