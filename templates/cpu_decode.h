// A head's few tokens on a CPU, on a state that is advanced in place. A part of the state at a time
// is converted into the nearest cache, taken through all tokens and written back. The operator's
// template has Token, with `v` and `y`, load_token, skip_row, and advance: `rows` vectors for a
// state whose rows are contiguous, `columns` for one whose columns are.
namespace {

constexpr int STAGE = {{stage_tokens}};  // tokens that are converted at once
constexpr int ROWS = 4;                  // rows of the state that are advanced together
static_assert(N % ROWS == 0, "a head is a whole number of groups of rows");

struct Workspace {
  alignas(64) Token tokens[STAGE];
  alignas(64) Real part[N * (ROWS > BLOCK_ROWS ? ROWS : BLOCK_ROWS)];
};

// Between two tokens of one call the state is rounded as between two calls, so that both give the
// same bits.
template <int COUNT>
void round_part(Real* part) {
  if constexpr (sizeof(StateElement) < sizeof(Real)) {
    for (int i = 0; i < COUNT; ++i) {
      StateElement stored;
      store(stored, part[i]);
      part[i] = load(stored);
    }
  }
}

void run_rows(StateElement* state, Workspace& work, int count, bool more) {
  Row* rows = reinterpret_cast<Row*>(work.part);
  for (int first = 0; first < N; first += ROWS) {
    for (int i = 0; i < ROWS; ++i) load_row<StateElement, N>(state, first + i, reals(rows[i]));
    for (int t = 0; t < count; ++t) {
      advance_rows<ROWS>(work.tokens[t], first, rows);
      if (more || t + 1 < count) round_part<ROWS * N>(work.part);
    }
    for (int i = 0; i < ROWS; ++i) store_row<StateElement, N>(reals(rows[i]), state, first + i);
  }
}

// COUNT vectors of each column, from row `first` on.
template <int COUNT>
void run_columns(StateElement* state, int first, Workspace& work, int count, bool more) {
  constexpr int WIDE = COUNT * WIDTH;
  for (int j = 0; j < N; ++j)
    for (int i = 0; i < WIDE; ++i)
      work.part[j * WIDE + i] = load(state[state_index<N, true>(first + i, j)]);
  for (int t = 0; t < count; ++t) {
    advance_columns<COUNT>(work.tokens[t], first, reinterpret_cast<Vector*>(work.part));
    if (more || t + 1 < count) round_part<WIDE * N>(work.part);
  }
  for (int j = 0; j < N; ++j)
    for (int i = 0; i < WIDE; ++i)
      store(state[state_index<N, true>(first + i, j)], work.part[j * WIDE + i]);
}

void run_tokens(StateElement* state, Workspace& work, int count, bool more) {
  if constexpr (STATE_IS_KV) {
    constexpr int REMAINDER = N % BLOCK_ROWS / WIDTH;
    for (int row = 0; row + BLOCK_ROWS <= N; row += BLOCK_ROWS)
      run_columns<BLOCK_VECTORS>(state, row, work, count, more);
    if constexpr (REMAINDER > 0)
      run_columns<REMAINDER>(state, N - REMAINDER * WIDTH, work, count, more);
  } else {
    run_rows(state, work, count, more);
  }
}

void run_head(const Arguments& args, int64_t b, int64_t head, Workspace& work) {
  const int64_t slot =
      args.state_indices == nullptr ? b : static_cast<const int32_t*>(args.state_indices)[b];
  const auto row_of = [&](int64_t t) { return (b * args.T + t) * args.H + head; };
  if (slot < 0 || slot >= args.P) {
    for (int64_t t = 0; t < args.T; ++t) skip_row(args, row_of(t));
    return;
  }
  StateElement* state = static_cast<StateElement*>(args.state) + (slot * args.H + head) * N * N;
  for (int64_t first = 0; first < args.T; first += STAGE) {
    const int count = static_cast<int>(std::min<int64_t>(STAGE, args.T - first));
    for (int t = 0; t < count; ++t) load_token(args, row_of(first + t), head, work.tokens[t]);
    run_tokens(state, work, count, first + count < args.T);
    for (int t = 0; t < count; ++t)
      store_row<Element, N>(reals(work.tokens[t].y), args.y, row_of(first + t));
  }
}

}  // namespace

RWKV_JIT_EXPORT int rwkv_jit_launch(const Arguments* args) {
  const double work = static_cast<double>(args->T) * N * N * 6;
  return run_items<Workspace>(
      args->threads, args->B * args->H, work,
      [&](int64_t item, Workspace& own) { run_head(*args, item / args->H, item % args->H, own); });
}
