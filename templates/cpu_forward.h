#include "rwkv_jit/states.h"

// A head's way through its chunks on a CPU. The operator's template has the Workspace, with
// `state` in blocks of rows, `y` and `all_keep`, and load_tokens and advance_rows.
namespace {

using States = rwkv_jit::States<Arguments>;

template <bool ALL_KEEP>
void advance(const Arguments& args, int64_t next, Workspace& work, int count) {
  constexpr int REMAINDER = N % BLOCK_ROWS / WIDTH;
  for (int row = 0; row + BLOCK_ROWS <= N; row += BLOCK_ROWS)
    advance_rows<BLOCK_VECTORS, ALL_KEEP>(args, next, work, row, count);
  if constexpr (REMAINDER > 0)
    advance_rows<REMAINDER, ALL_KEEP>(args, next, work, N - REMAINDER * WIDTH, count);
}

void load_state(const Arguments& args, int64_t at, Workspace& work) {
  const StateElement* from = static_cast<const StateElement*>(States::before(args));
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j)
      work.state[packed_index<N, BLOCK_ROWS>(i, j)] =
          from == nullptr ? Real(0) : load(from[at * N * N + state_index<N, STATE_IS_KV>(i, j)]);
}

void store_state(const Arguments& args, int64_t at, const Workspace& work) {
  StateElement* to = static_cast<StateElement*>(States::after(args));
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < N; ++j)
      store(to[at * N * N + state_index<N, STATE_IS_KV>(i, j)],
            work.state[packed_index<N, BLOCK_ROWS>(i, j)]);
}

void store_checkpoint(const Arguments& args, int64_t place, int64_t head, const Workspace& work) {
  void* const checkpoints = States::checkpoints(args);
  if (checkpoints == nullptr) return;
  Real* to = static_cast<Real*>(checkpoints) + (place * args.H + head) * N * N;
  std::copy_n(work.state, N * N, to);
}

void run_forward(const Arguments& args, int64_t s, int64_t head, Workspace& work) {
  const Sequence sequence = find_sequence(args, s, L);
  const int64_t row = States::row(args, s);
  const bool done =
      only_zeros(args, s, sequence, row, [&](int64_t begin, int64_t end, int64_t step) {
        for (int64_t token = begin; token < end; token += step)
          std::fill_n(static_cast<Element*>(args.y) + (token * args.H + head) * N, N, Element{});
      });
  if (done) return;
  load_state(args, row * args.H + head, work);
  int64_t checkpoint = sequence.first_checkpoint;
  for (int64_t first = sequence.begin; first < sequence.end; first += L, ++checkpoint) {
    const int count = static_cast<int>(std::min<int64_t>(L, sequence.end - first));
    store_checkpoint(args, checkpoint, head, work);
    load_tokens(args, first, count, head, work);
    const int64_t next = (first + L) * args.H + head;
    work.all_keep ? advance<true>(args, next, work, count)
                  : advance<false>(args, next, work, count);
    for (int t = 0; t < count; ++t)
      store_row<Element, N>(work.y[t], args.y, (first + t) * args.H + head);
  }
  // A place that no chunk needs is written all the same, so that no output is left undefined.
  if (checkpoint < sequence.first_checkpoint + sequence.checkpoints)
    store_checkpoint(args, checkpoint, head, work);
  if (States::after(args) != nullptr) store_state(args, row * args.H + head, work);
}

// All sequences and heads, a token of which is `work` multiply-adds. Returns the launcher's code.
int run_forwards(const Arguments& args, double work) {
  // Tokens without a sequence, and so without one that sees to them.
  if (States::IN_POOL && args.S == 0 && args.cu_seqlens != nullptr)
    std::fill_n(static_cast<Element*>(args.y), args.T * args.H * N, Element{});
  return run_heads<Workspace>(args, work, run_forward);
}

}  // namespace
