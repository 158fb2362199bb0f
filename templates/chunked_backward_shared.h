// Shared memory of the tensor-core backward.
namespace {

using StateRows = bf16[N][ROW];  // a state, rounded, [value, key]

// The states before STATES chunks, and what the chunk at hand passes between the warps.
template <int STATES>
struct Work {
  StateRows state[STATES];
  StateRows d;         // D after the chunk
  bf16 u[N][PADDED];   // U, [value, token]
  bf16 dx[N][PADDED];  // dX
};

// For COUNT chunks, so tight that two blocks find room: what is done with makes place for what
// comes.
template <int COUNT>
struct TightShared {
  Chunk chunks[COUNT];
  bf16 v[COUNT * TOKENS][ROW], dy[COUNT * TOKENS][ROW];
  union {
    Raw raw[COUNT];  // until the chunks are prepared, and so are the partials
    Partials partials[COUNT];
    Work<COUNT - 1> work;
  };

  // The first chunk's state takes the place of the last chunk.
  __device__ __forceinline__ StateRows& state_before(int at) {
    return at > 0 ? work.state[at - 1] : reinterpret_cast<StateRows&>(chunks[COUNT - 1]);
  }
  // The tensors of a chunk again, in the place of the next one.
  __device__ __forceinline__ Raw& raw_of(int at) { return reinterpret_cast<Raw&>(chunks[at + 1]); }
};

template <int COUNT>
struct RoomyShared {
  Chunk chunks[COUNT];
  bf16 v[COUNT * TOKENS][ROW], dy[COUNT * TOKENS][ROW];
  Raw raw[COUNT];
  union {
    Partials partials[COUNT];  // until the chunks are prepared
    Work<COUNT> work;
  };

  __device__ __forceinline__ StateRows& state_before(int at) { return work.state[at]; }
  __device__ __forceinline__ Raw& raw_of(int at) { return raw[at]; }
};

constexpr bool TIGHT = N == 64;
using Shared = std::conditional_t<TIGHT, TightShared<CHUNKS>, RoomyShared<CHUNKS>>;
static_assert(!TIGHT || sizeof(Raw) <= sizeof(Chunk), "the tensors fit over a chunk");
static_assert(!TIGHT || sizeof(StateRows) <= sizeof(Chunk), "a state fits over a chunk");
static_assert(sizeof(Chunk::k) + sizeof(Chunk::b) >= rwkv_jit::TRIANGLES * TOKENS * PADDED * 2,
              "the triangles' gradients fit over K'' and B^");

// They take the place of K'', which then is done with.
__device__ __forceinline__ bf16* triangle_of(Chunk& chunk, int which) {
  return &chunk.k[0][0] + which * TOKENS * PADDED;
}

}  // namespace
