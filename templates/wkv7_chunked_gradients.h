// The gradients of a chunk: those in its triangles, and those of its channels.
namespace {

using namespace rwkv_jit;

constexpr bool BOUNDED = {{bounded}};  // no decay is below e^-8

// dX or dY times U^T or V^T.
template <bool OF_DX, bool WITH_U>
__device__ __forceinline__ void triangle_product(Shared& shared, int at, Accumulator (&sum)[2]) {
  Chunk& chunk = shared.chunks[at];
  Accumulator odd[2] = {};         // two sums, so that each waits for half as many others
#pragma unroll(APART ? STEPS : 2)  // all where registers allow it
  for (int step = 0; step < STEPS; ++step) {
    OperandA left;
    OperandB right;
    if constexpr (OF_DX) {
      load_transposed<PADDED>(&dx_of(chunk)[16 * step][0], left);
    } else {
      load<ROW>(&shared.dy[at * TOKENS][16 * step], left);
    }
    if constexpr (WITH_U) {
      load<PADDED>(&u_of(chunk)[16 * step][0], right);
    } else {
      load_transposed<ROW>(&shared.v[at * TOKENS][16 * step], right);
    }
    add_product(step % 2 ? odd : sum, OF_DX ? left : rounded(left),
                WITH_U ? right : rounded(right));
  }
  add(odd, sum);
}

// The gradient of one of a chunk's triangles, by this warp.
__device__ __forceinline__ void triangle_gradient(Shared& shared, int at, int which) {
  Accumulator sum[2] = {};
  if (which == AB) triangle_product<true, true>(shared, at, sum);
  if (which == AK) triangle_product<true, false>(shared, at, sum);
  if (which == QB) triangle_product<false, true>(shared, at, sum);
  if (which == QK) triangle_product<false, false>(shared, at, sum);
  if (which == AB || which == AK) {
    lower_triangle<true>(sum);
  } else {
    lower_triangle<false>(sum);
  }
  store_matrix(sum, triangle_of(shared.chunks[at], which));
}

// Asks for a chunk's v and dY.
template <int COUNT>
__device__ __forceinline__ void fetch_values(const Arguments& args, const Tokens& tokens, int first,
                                             int thread, Shared& shared, int at) {
  fetch_rows<TOKENS, COUNT>(args.v, tokens, first, thread, &shared.v[at * TOKENS]);
  fetch_rows<TOKENS, COUNT>(args.dy, tokens, first, thread, &shared.dy[at * TOKENS]);
}

// Asks for the tensors of the chunk whose first token is `first`, to place `at`.
__device__ __forceinline__ void fetch_chunk(const Arguments& args, int first, Shared& shared,
                                            int at) {
  const Tokens tokens = shared.turn.tokens;
  fetch<THREADS>(args, tokens, first, threadIdx.x, shared.raw[at]);
  fetch_values<THREADS>(args, tokens, first, threadIdx.x, shared, at);
}

// Asks for what comes where the chunk at `first`, in place `at`, and the state before it were: the
// state before the next chunk and, where all warps prepare chunks, the tensors of the span before.
__device__ __forceinline__ void fetch_next(const Arguments& args, int first, Shared& shared,
                                           int at) {
  const bool is_first = first % SPAN == 0, is_last = first - first % SPAN == shared.turn.begin;
  if (!is_first || (APART && !is_last))
    fetch_checkpoint(args, shared.turn.checkpoint - (is_first ? static_cast<int>(args.H) : 0),
                     shared);
  if (!APART && !is_last) fetch_chunk(args, first - SPAN, shared, at);
}

// sum += triangle^T right.
__device__ __forceinline__ void add_columns(Accumulator (&sum)[2], const Element* triangle,
                                            const OperandB& right) {
  OperandA left;
  load_transposed<PADDED>(triangle, left);
  add_product(sum, left, right);
}
// sum += triangle right.
__device__ __forceinline__ void add_rows(Accumulator (&sum)[2], const Element* triangle,
                                         const OperandB& right) {
  OperandA left;
  load<PADDED>(triangle, left);
  add_product(sum, left, right);
}

// Gradients of r, w, k, a and b for sixteen channels, from `key` on, of the chunk in place `at`,
// whose first token is `first`, by this warp.
__device__ __forceinline__ void channel_gradients(const Arguments& args, int first, Shared& shared,
                                                  int at, int key) {
  const Tokens& tokens = shared.turn.tokens;
  const TokenSums sums(forgotten_lane());
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  Chunk& chunk = shared.chunks[at];
  const Raw& raw = shared.raw[at];
  const bool valid[2] = {first + g < tokens.count, first + g + 8 < tokens.count};
  const int64_t place = tokens.at(first + g) + key + 2 * q;
  const int stride = tokens.stride;
  // What is in shared memory is read again where it is needed again: registers are short.
  const auto rows_of = [key](const Element(&tensor)[TOKENS][ROW]) {
    OperandA rows;
    load<ROW>(&tensor[0][key], rows);
    return rows;
  };
  float log2_d[8];
  load_log2_decays<DECAY, BOUNDED>(args, tokens, first, key, raw.w, log2_d);
  const Decays decays = decays_of<DECAY, BOUNDED>(log2_d);

  // Against the states. What crosses a token: from states before it to rows at or after it (a:
  // after it alone), from columns before it to the state after the chunk, and from state to state.
  Accumulator dr[2] = {}, da[2] = {}, dk[2] = {}, db[2] = {}, dw[2] = {}, factors[2];
  {
#pragma unroll(N > 64 ? STEPS : 2)
    for (int step = 0; step < STEPS; ++step) {
      OperandA left;
      OperandB right;
      load<BLOCKED>(shared.state[step][key / 16], right);
      load<ROW>(&shared.dy[at * TOKENS][16 * step], left);
      add_product(dr, rounded(left), right);
      load_transposed<PADDED>(&dx_of(chunk)[16 * step][0], left);
      add_product(da, left, right);
    }
    exp2_of_sums(sums.sum_up_to(), decays.log_d, factors);
    scale(dr, factors);
    add_overlap(rows_of(raw.r), dr, dw);
    exp2_of_sums(sums.sum_before(), decays.log_d, factors);
    scale(da, factors);
    Accumulator terms[2] = {};
    add(dw, terms);
    add_overlap(rows_of(raw.a), da, terms);
    add_product(dw, sums.sum_after(), to_second(to_operand(terms[0], terms[1])));
  }
  {
    Accumulator overlap[2] = {};  // S0^T D
#pragma unroll(N > 64 ? STEPS : 1)
    for (int step = 0; step < STEPS; ++step) {
      OperandA left;
      OperandB right;
      load<BLOCKED>(shared.d[step][key / 16], right);
      load<ROW>(&shared.v[at * TOKENS][16 * step], left);
      add_product(dk, rounded(left), right);
      load_transposed<PADDED>(&u_of(chunk)[16 * step][0], left);
      add_product(db, left, right);
      load_transposed<BLOCKED>(shared.state[step][key / 16], left);
      add_product(overlap, left, right);
    }
    exp2_of_sums(sums.sum_after(), decays.log_d, factors);
    scale(dk, factors);
    scale(db, factors);
    Accumulator terms[2] = {};
    add_overlap(rows_of(raw.k), dk, terms);
    add_overlap(rows_of(raw.b), db, terms);
    add_product(dw, sums.sum_before(), to_second(to_operand(terms[0], terms[1])));
    float through[2][2];
    diagonal(overlap, through);
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float2 total = *reinterpret_cast<const float2*>(&chunk.total[key + 8 * tile + 2 * q]);
#pragma unroll
      for (int x = 0; x < 4; ++x) dw[tile][x] += (x % 2 ? total.y : total.x) * through[tile][x % 2];
    }
  }

  // In the triangles. What crosses a token: rows at or after it (a: after it alone) from columns
  // before it. What does not cross cancels, as these are the very products.
  Accumulator to_middle[2], crossing[2] = {}, own[2] = {};
  OperandA r, k, a, b;
  {
    exp2_of_sums(sums.from_middle(), decays.bounded, factors, to_middle);
    if constexpr (APART) wait_at<THREADS>(TRIANGLES_BARRIER);
    const OperandA columns = to_operand<stored>(to_middle[0], to_middle[1]);
    k = times(rows_of(raw.k), columns), b = times(rows_of(raw.b), columns);
    const OperandB second_k = to_second(k), second_b = to_second(b);
    {
      Accumulator sum[2] = {};
      r = times(rows_of(raw.r), to_operand<stored>(factors[0], factors[1]));
      add_rows(sum, triangle_of(chunk, QB), second_b);
      add_rows(sum, triangle_of(chunk, QK), second_k);
      add_overlap(r, sum, crossing);
      scale_and_add(sum, factors, dr);
      store_pairs(sum, args.dr, place, stride, valid);
    }
    {
      Accumulator sum[2] = {};
      exp2_of_sums(sums.from_middle_before(), decays.bounded, factors);
      a = times(rows_of(raw.a), to_operand<stored>(factors[0], factors[1]));
      add_rows(sum, triangle_of(chunk, AB), second_b);
      add_rows(sum, triangle_of(chunk, AK), second_k);
      add_overlap(a, sum, own);
      scale_and_add(sum, factors, da);
      store_pairs(sum, args.da, place, stride, valid);
      if constexpr (APART) arrive_at<THREADS>(READ_BARRIER + at);
      sync_state();  // the readers of the chunk's tensors and of the states are done
      fetch_next(args, first, shared, at);
    }
  }
  const OperandB second_r = to_second(r), second_a = to_second(a);
  const auto store_column = [&](Triangle of_r, Triangle of_a, const OperandA& columns,
                                const Accumulator(&against_state)[2], void* to) {
    Accumulator sum[2] = {};
    add_columns(sum, triangle_of(chunk, of_r), second_r);
    add_columns(sum, triangle_of(chunk, of_a), second_a);
    add_overlap<true>(columns, sum, crossing);
    scale_and_add(sum, to_middle, against_state);
    store_pairs(sum, to, place, stride, valid);
  };
  store_column(QK, AK, k, dk, args.dk);
  store_column(QB, AB, b, db, args.db);
#pragma unroll
  for (int tile = 0; tile < 2; ++tile)
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
      float upper = crossing[tile][odd] + own[tile][odd],
            lower = crossing[tile][2 + odd] + own[tile][2 + odd];
      running_sum_back(upper, lower);
      crossing[tile][odd] = upper - own[tile][odd];
      crossing[tile][2 + odd] = lower - own[tile][2 + odd];
    }
  Accumulator log_d[2] = {};
  add_product(log_d, sums.same(), decays.log_d);
#pragma unroll
  for (int x = 0; x < 8; ++x) {
    const float log = log_d[x / 4][x % 4];
    // The triangles have the bounded decay; what crosses this token has its own in truth.
    const float ratio = BOUNDED ? 1.0f : exp2_fast(fminf(log - STRONGEST, 0.0f));
    float& sum = dw[x / 4][x % 4];
    sum = fmaf(crossing[x / 4][x % 4], ratio, sum) * decay_slope<DECAY>(log);
  }
  if (is_wide(args.dw_dtype)) {
    store_wide_pairs(dw, args.dw, place, stride, valid);
  } else {
    store_pairs(dw, args.dw, place, stride, valid);
  }
}

// The gradients of the chunk in place `at`, whose first token is `first`, and D back through it.
__device__ __forceinline__ void chunk_gradients(const Arguments& args, int first, Shared& shared,
                                                int at, State& d) {
  const int warp = threadIdx.x / 32;
  Chunk& chunk = shared.chunks[at];
  Accumulator u[2] = {}, dx[2] = {};
  make_u(shared, at, u);
  scan_backward<false>(args, first, shared, at, d, dx);
  sync_state();  // W, R', K'' and B^ are done with
  store_matrix(u, u_of(chunk)[own_value()]);
  store_matrix(dx, dx_of(chunk)[own_value()]);
  if constexpr (APART) arrive_at<THREADS>(VALUES_BARRIER);
  sync_state();  // U, dX, the state and D are there
  if constexpr (!APART) {
    if (warp < TRIANGLES) triangle_gradient(shared, at, warp);
    sync_state();
  }
  channel_gradients(args, first, shared, at, warp * 16);
}

}  // namespace
