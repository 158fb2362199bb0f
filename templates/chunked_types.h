namespace {

using StateElement = rwkv_jit::{{state_dtype}};
constexpr auto DECAY = static_cast<rwkv_jit::DecayKind>({{decay}});
constexpr int WARPS = 4;
constexpr int SPAN = {{checkpoint_tokens}};  // tokens between two checkpoints
constexpr int SHARED_BYTES = {{shared_bytes}};
static_assert(sizeof(rwkv_jit::{{dtype}}) == 2 && N == rwkv_jit::CHANNELS);
static_assert(L == rwkv_jit::TOKENS && SPAN == WARPS * L);

// This lane's place in the state's matrix: rows g and g + 8 of the warp's 16.
__device__ __forceinline__ int64_t state_place(int64_t head_index, int tile, int at) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + at / 2 * 8;
  const int key = rwkv_jit::channel_of(tile, threadIdx.x % 4, at % 2);
  return head_index * N * N + (STATE_IS_KV ? key * N + row : row * N + key);
}

__device__ __forceinline__ void load_state(const void* from, int64_t head_index,
                                           rwkv_jit::Accumulator (&state)[8]) {
#pragma unroll
  for (int tile = 0; tile < 8; ++tile)
#pragma unroll
    for (int at = 0; at < 4; ++at)
      state[tile][at] = from == nullptr ? 0.0f
                                        : rwkv_jit::load_at<StateElement>(
                                              from, state_place(head_index, tile, at));
}

__device__ __forceinline__ void store_state(const rwkv_jit::Accumulator (&state)[8], void* to,
                                            int64_t head_index) {
  if (to == nullptr) return;
#pragma unroll
  for (int tile = 0; tile < 8; ++tile)
#pragma unroll
    for (int at = 0; at < 4; ++at)
      rwkv_jit::store_at<StateElement>(to, state_place(head_index, tile, at), state[tile][at]);
}

// Checkpoints lie as the lanes hold them: [warp, tile, lane, 4].
__device__ __forceinline__ float4* checkpoint_place(const Arguments& args, int64_t head,
                                                    int64_t place) {
  float* to = static_cast<float*>(args.checkpoints) + (place * args.H + head) * N * N;
  return reinterpret_cast<float4*>(to) + threadIdx.x / 32 * 8 * 32 + threadIdx.x % 32;
}

[[maybe_unused]] __device__ __forceinline__ void load_checkpoint(
    const Arguments& args, int64_t head, int64_t place, rwkv_jit::Accumulator (&state)[8]) {
  const float4* checkpoint = checkpoint_place(args, head, place);
#pragma unroll
  for (int tile = 0; tile < 8; ++tile) {
    const float4 four = checkpoint[tile * 32];
    state[tile][0] = four.x, state[tile][1] = four.y;
    state[tile][2] = four.z, state[tile][3] = four.w;
  }
}

// A span's rows of one tensor to shared memory, zeros past the end; there after copies_done().
__device__ __forceinline__ void copy_rows(const void* from, int64_t heads, int64_t first,
                                          int64_t end, int64_t head,
                                          rwkv_jit::bf16 (*to)[rwkv_jit::ROW]) {
  for (int at = threadIdx.x; at < SPAN * N / 8; at += WARPS * 32) {
    const int token = at / (N / 8), column = at % (N / 8) * 8;
    const bool valid = first + token < end;
    const int64_t row = (valid ? first + token : first) * heads + head;
    rwkv_jit::copy_async(&to[token][column],
                         static_cast<const rwkv_jit::bf16*>(from) + row * N + column, valid);
  }
}

}  // namespace

RWKV_JIT_EXPORT const char* rwkv_jit_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
