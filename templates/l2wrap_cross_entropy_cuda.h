namespace {

using namespace rwkv_jit;
using Element = rwkv_jit::{{dtype}};
static_assert({{head_size}} == 0, "there are no heads");

constexpr int THREADS = 256;
constexpr int64_t IGNORED = -1;
constexpr float NOT_A_NUMBER = __builtin_nanf("");

}  // namespace
