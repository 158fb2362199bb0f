// Every value of the configuration enters here, once; the rest of the source is plain C++ or CUDA.
//% include "launcher.h"

namespace {

constexpr int N = {{head_size}};  // head size
// Tokens between two checkpoints.
[[maybe_unused]] constexpr int L = {{chunk_length}};
constexpr bool STATE_IS_KV = {{state_is_kv}};

}  // namespace
