// wkv6 has a decay for each token, wkv5 one for all of them.
namespace {

constexpr bool DECAY_PER_TOKEN = {{decay_per_token}};

// The row of w for a token of a head, which lies in `row` of the other tensors.
[[maybe_unused]] RWKV_JIT_SHARED_CODE int64_t decay_row(int64_t row, int64_t head) {
  return DECAY_PER_TOKEN ? row : head;
}

}  // namespace
