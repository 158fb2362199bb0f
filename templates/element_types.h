namespace {

using Element = rwkv_jit::{{dtype}};
using StateElement = rwkv_jit::{{state_dtype}};
constexpr auto DECAY = static_cast<rwkv_jit::DecayKind>({{decay}});

}  // namespace
