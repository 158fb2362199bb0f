namespace {

using namespace rwkv_jit;
using Element = rwkv_jit::{{dtype}};
static_assert({{head_size}} == 0, "there are no heads");
using Real = RealOf<Element>::type;
constexpr int VECTOR_BYTES = {{vector_bytes}}, WIDTH = VECTOR_BYTES / sizeof(Real);
using Vector = VectorOf<Real, VECTOR_BYTES>::type;
using Exp = Exponential<Real, VECTOR_BYTES>;

constexpr int64_t IGNORED = -1;
constexpr Real INFINITE = std::numeric_limits<Real>::infinity();
constexpr Real NOT_A_NUMBER = std::numeric_limits<Real>::quiet_NaN();
// Below this e^x is 0.
constexpr Real LEAST = sizeof(Real) == sizeof(float) ? -88 : -745;

// e^x of x that are at most 0, or not numbers.
inline Vector exponential(Vector x) { return Exp(x < LEAST ? splat<Vector>(LEAST) : x).value; }

template <typename Run>
int run_tokens(const Arguments& args, const Run& run) {
  const int64_t tokens = args.B * args.T;
  const double work = 16.0 * static_cast<double>(args.C);
  parallel_for(tokens, useful_threads(args.threads, tokens, work),
               [&](int64_t token, int64_t) { run(token); });
  return 0;
}

}  // namespace
