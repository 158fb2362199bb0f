// A head's way back through its chunks on a CPU, a few rows of the state at a time. The operator's
// template has the Workspace, with a row of `g` for each of the state's and `history` for a few of
// them, ROWS, and load_tokens, run_rows and store_gradients.
namespace {

void run_backward(const Arguments& args, int64_t s, int64_t head, Workspace& work) {
  const Sequence sequence = find_sequence(args, s, L);
  const int64_t state_at = (s * args.H + head) * N * N;
  const StateElement* dfinal = static_cast<const StateElement*>(args.dfinal_state);
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j)
      reals(work.g[i])[j] =
          dfinal == nullptr ? Real(0) : load(dfinal[state_at + state_index<N, STATE_IS_KV>(i, j)]);

  const int64_t chunks = (sequence.end - sequence.begin + L - 1) / L;
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const int64_t first = sequence.begin + chunk * L;
    const int count = static_cast<int>(std::min<int64_t>(L, sequence.end - first));
    load_tokens(args, first, count, head, work);
    const Real* checkpoint = static_cast<const Real*>(args.checkpoints) +
                             ((sequence.first_checkpoint + chunk) * args.H + head) * N * N;
    for (int row = 0; row < N; row += ROWS) {
      for (int i = 0; i < ROWS; ++i)
        for (int j = 0; j < N; ++j)
          reals(work.history[0][i])[j] = checkpoint[packed_index<N, BLOCK_ROWS>(row + i, j)];
      run_rows(args, (first - L) * args.H + head, work, row, count);
    }
    store_gradients(args, first, count, head, work);
  }

  StateElement* dinitial = static_cast<StateElement*>(args.dinitial_state);
  if (dinitial == nullptr) return;
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j)
      store(dinitial[state_at + state_index<N, STATE_IS_KV>(i, j)], reals(work.g[i])[j]);
}

}  // namespace
