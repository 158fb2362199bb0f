// A recurrence's way back: one block per sequence and head, from the last token to the first. The
// states of STEP tokens are made again from the chunk's checkpoint and kept in registers, so the
// decay is never divided by. Where a head has more rows than fit, groups of rows take turns, and G
// of those that wait lies in dstate. The operator's template has the vectors of a token in Shared,
// and load_token, advance_state, run_step and store_gradients.
namespace {

// G's row of a head whose rows take turns.
template <typename Args>
__device__ __forceinline__ float* waiting_row(const Args& args, int64_t head_index, int row) {
  if constexpr (GROUPS > 1) {
    return static_cast<float*>(args.dstate) + (head_index * N + row) * N;
  } else {
    return nullptr;
  }
}

// Reads, converts and gates a step of tokens; those past the end change nothing.
__device__ __forceinline__ void load_tokens(const Arguments& args, int64_t first, int64_t end,
                                            int64_t head, Shared& shared) {
  __syncthreads();  // the last tokens' readers are done
  for (int at = threadIdx.x; at < STEP * N; at += THREADS) {
    const int t = at / N, j = at % N;
    if (first + t < end) {
      load_token(args, first + t, head, j, shared.tokens[t]);
    } else {
#pragma unroll
      for (int vector = 0; vector < VECTORS; ++vector)
        shared.tokens[t][vector][j] = vector == KEEP ? 1.0f : 0.0f;
    }
  }
  __syncthreads();
}

// Takes a head from its last token to its first. head_index: s * H + head.
__device__ __forceinline__ void walk_back(const Arguments& args, int64_t head_index,
                                          Shared& shared) {
  const Tile<N> tile;
  const int64_t head = head_index % args.H;
  const int lane_row =
      static_cast<int>(threadIdx.x / 32) * WARP_ROWS + tile.row_lane * ROWS;  // in its group
  const Sequence sequence = find_sequence(args, head_index / args.H, L);

  float g[ROWS][LANE_COLUMNS];
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = group * BLOCK_ROWS + lane_row + i;
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j)
        g[i][j] =
            args.dfinal_state == nullptr
                ? 0.0f
                : load_at<StateElement>(args.dfinal_state,
                                        head_index * N * N + state_index(row, tile.column(j)));
      if constexpr (GROUPS > 1) tile.write(g[i], waiting_row(args, head_index, row));
    }
  }

  const int64_t chunks = (sequence.end - sequence.begin + L - 1) / L;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t chunk_first = sequence.begin + chunk * L;
    const float* checkpoint = static_cast<const float*>(args.checkpoints) +
                              ((sequence.first_checkpoint + chunk) * args.H + head) * N * N;
    const int64_t count = min(sequence.end - chunk_first, static_cast<int64_t>(L));
    for (int step = static_cast<int>(count - 1) / STEP; step >= 0; --step) {
      const int64_t first = chunk_first + step * STEP;
      for (int group = 0; group < GROUPS; ++group) {
        const int first_row = group * BLOCK_ROWS + lane_row;
        float state[ROWS][LANE_COLUMNS];
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
          tile.read(checkpoint + (first_row + i) * N, state[i]);
          if constexpr (GROUPS > 1) tile.read(waiting_row(args, head_index, first_row + i), g[i]);
        }
        for (int before = 0; before < step; ++before) {
          load_tokens(args, chunk_first + before * STEP, sequence.end, head, shared);
          for (int t = 0; t < STEP; ++t) {
            float v[ROWS];
#pragma unroll
            for (int i = 0; i < ROWS; ++i) v[i] = shared.tokens[t][V][first_row + i];
            advance_state(tile, shared.tokens[t], v, state);
          }
        }
        load_tokens(args, first, sequence.end, head, shared);
        if (group == 0) {
          run_step<true>(args, tile, first, sequence.end, head, first_row, state, g, shared);
        } else {
          run_step<false>(args, tile, first, sequence.end, head, first_row, state, g, shared);
        }
        if constexpr (GROUPS > 1) {
#pragma unroll
          for (int i = 0; i < ROWS; ++i)
            tile.write(g[i], waiting_row(args, head_index, first_row + i));
        }
      }
      store_gradients(args, first, sequence.end, head, shared);
    }
  }

  if (args.dinitial_state == nullptr) return;
  for (int group = 0; group < GROUPS; ++group) {
#pragma unroll
    for (int i = 0; i < ROWS; ++i) {
      const int row = group * BLOCK_ROWS + lane_row + i;
      if constexpr (GROUPS > 1) tile.read(waiting_row(args, head_index, row), g[i]);
#pragma unroll
      for (int j = 0; j < LANE_COLUMNS; ++j)
        store_at<StateElement>(args.dinitial_state,
                               head_index * N * N + state_index(row, tile.column(j)), g[i][j]);
    }
  }
}

template <typename Kernel>
cudaError_t launch_heads(const Arguments& args, const Kernel& kernel) {
  const int64_t blocks = args.S * args.H;
  if (blocks == 0) return cudaSuccess;
  const int bytes = sizeof(Shared);
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const auto stream = static_cast<cudaStream_t>(args.stream);
  kernel<<<static_cast<unsigned>(blocks), THREADS, bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace
