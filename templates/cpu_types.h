namespace {

using Element = rwkv_jit::{{dtype}};
using StateElement = rwkv_jit::{{state_dtype}};
constexpr auto DECAY = static_cast<rwkv_jit::DecayKind>({{decay}});
constexpr int VECTOR_BYTES = {{vector_bytes}};

using Real = rwkv_jit::RealOf<Element>::type;
using Vector = rwkv_jit::VectorOf<Real, VECTOR_BYTES>::type;
using Gate = rwkv_jit::Decay<DECAY, Real, VECTOR_BYTES>;
constexpr int WIDTH = VECTOR_BYTES / sizeof(Real);
constexpr int VECTORS = N / WIDTH;
static_assert(N % WIDTH == 0, "a row is a whole number of vectors");
using Row = Vector[VECTORS];

inline Real* reals(Vector* row) { return reinterpret_cast<Real*>(row); }

// Rows of the state that are advanced together: as many as leave every vector in a register.
constexpr int BLOCK_VECTORS = VECTOR_BYTES == 64 ? 4 : 2;
constexpr int BLOCK_ROWS = BLOCK_VECTORS * WIDTH;

}  // namespace

#include "rwkv_jit/cpu/error.h"
