namespace {

using rwkv_jit::Accumulator;
using rwkv_jit::bf16;
using rwkv_jit::Chunk;
using rwkv_jit::OperandA;
using rwkv_jit::OperandB;
using rwkv_jit::PADDED;
using rwkv_jit::Raw;
using rwkv_jit::ROW;
using rwkv_jit::Tokens;
using rwkv_jit::TOKENS;

using StateElement = rwkv_jit::{{state_dtype}};
constexpr auto DECAY = static_cast<rwkv_jit::DecayKind>({{decay}});
constexpr int STEPS = N / 16;  // of sixteen channels
constexpr int WARPS = {{warps}};
constexpr int THREADS = WARPS * 32;
constexpr int STATE_WARPS = N / 16;          // each with sixteen of the state's rows
constexpr int SPAN = {{checkpoint_tokens}};  // tokens between two checkpoints
constexpr int CHUNKS = SPAN / TOKENS;        // that are prepared side by side
constexpr int PARTS = WARPS / CHUNKS;        // warps that prepare one
constexpr int BLOCKS = {{blocks}};           // that share a multiprocessor
using Partials = rwkv_jit::Partials<PARTS>;
constexpr int SHARED_BYTES = {{shared_bytes}};
static_assert(std::is_same_v<rwkv_jit::{{dtype}}, bf16>);
static_assert(L == TOKENS && SPAN == CHUNKS * L && WARPS == CHUNKS * PARTS);
static_assert(WARPS >= STATE_WARPS);

// A warp's sixteen rows of the state, [value, key].
using State = Accumulator[STEPS][2];

__device__ __forceinline__ int own_value() { return threadIdx.x / 32 % STATE_WARPS * 16; }

// This lane's place in the state's matrix.
__device__ __forceinline__ int64_t state_place(int64_t head_index, int step, int tile, int at) {
  const int row = own_value() + threadIdx.x % 32 / 4 + at / 2 * 8;
  const int key = 16 * step + 8 * tile + threadIdx.x % 4 * 2 + at % 2;
  return head_index * N * N + (STATE_IS_KV ? key * N + row : row * N + key);
}

__device__ __forceinline__ void load_state(const void* from, int64_t head_index, State& state) {
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int at = 0; at < 8; ++at)
      state[step][at / 4][at % 4] = from == nullptr
                                        ? 0.0f
                                        : rwkv_jit::load_at<StateElement>(
                                              from, state_place(head_index, step, at / 4, at % 4));
}

__device__ __forceinline__ void store_state(const State& state, void* to, int64_t head_index) {
  if (to == nullptr) return;
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int at = 0; at < 8; ++at)
      rwkv_jit::store_at<StateElement>(to, state_place(head_index, step, at / 4, at % 4),
                                       state[step][at / 4][at % 4]);
}

__device__ __forceinline__ Tokens tokens_of(const Arguments& args,
                                            const rwkv_jit::Sequence& sequence, int64_t head) {
  return {(sequence.begin * args.H + head) * N, static_cast<int>(args.H * N),
          static_cast<int>(sequence.end - sequence.begin)};
}

// Checkpoints lie as the lanes hold them: [warp, step, tile, lane, 4].
using CheckpointPart = std::conditional_t<{{rounded_checkpoints}}, uint2, float4>;
constexpr int CHECKPOINT_BYTES = N * N / 4 * static_cast<int>(sizeof(CheckpointPart));
// This lane's part of one, the first tile's; others follow 32 apart.
__device__ __forceinline__ CheckpointPart* checkpoint_place(const Arguments& args, int64_t index) {
  char* checkpoint = static_cast<char*>(args.checkpoints) + index * CHECKPOINT_BYTES;
  return reinterpret_cast<CheckpointPart*>(checkpoint) +
         threadIdx.x / 32 % STATE_WARPS * STEPS * 2 * 32 + threadIdx.x % 32;
}

// state <- state diag(P_L) + left_a right_a + left_b right_b.
__device__ __forceinline__ void step_state(State& state, const Chunk& chunk, const OperandA& left_a,
                                           const bf16 (&right_a)[TOKENS][ROW],
                                           const OperandA& left_b,
                                           const bf16 (&right_b)[TOKENS][ROW]) {
  const int q = threadIdx.x % 4;
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      Accumulator& sum = state[step][tile];
      const float2 decay =
          *reinterpret_cast<const float2*>(&chunk.total[16 * step + 8 * tile + 2 * q]);
      sum[0] *= decay.x, sum[1] *= decay.y;
      sum[2] *= decay.x, sum[3] *= decay.y;
    }
    OperandB right;
    rwkv_jit::load<ROW>(&right_a[0][16 * step], right);
    rwkv_jit::add_product(state[step], left_a, right);
    rwkv_jit::load<ROW>(&right_b[0][16 * step], right);
    rwkv_jit::add_product(state[step], left_b, right);
  }
}

// Writes this warp's sixteen values, [value, token], of a chunk to a tensor.
__device__ __forceinline__ void store_values(const Accumulator (&values)[2], void* to,
                                             const Tokens& tokens, int first) {
  const int token = first + threadIdx.x % 32 / 4;
  const OperandB rows = rwkv_jit::to_second(rwkv_jit::to_operand(values[0], values[1]));
  bf16* place = static_cast<bf16*>(to) + tokens.at(token) + own_value() + threadIdx.x % 4 * 2;
#pragma unroll
  for (int part = 0; part < 4; ++part)
    if (token + part / 2 * 8 < tokens.count)
      *reinterpret_cast<uint32_t*>(place + part / 2 * 8 * tokens.stride + part % 2 * 8) =
          rows.at[part];
}

// One block for a sequence and head.
template <typename Shared>
int launch(void (*kernel)(Arguments), const Arguments& args) {
  static_assert(sizeof(Shared) == SHARED_BYTES, "the spec knows how much it is");
  const int64_t blocks = args.S * args.H;
  if (blocks == 0) return cudaSuccess;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (error != cudaSuccess) return error;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  kernel<<<static_cast<unsigned>(blocks), THREADS, SHARED_BYTES, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace

RWKV_JIT_EXPORT const char* rwkv_jit_error(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
