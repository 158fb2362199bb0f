"""Small sources with the exports of a kernel library, for tests of building and caching."""

from __future__ import annotations

from rwkv_jit.arch import is_cuda
from rwkv_jit.config import OpConfig
from rwkv_jit.render import RenderedSource
from rwkv_jit.spec import LAUNCHER_ABI

CPU_SLUG = "wkv7_n64_fp32_l16_x86_64_v2"
CUDA_SLUG = "wkv7_n64_bf16_l16_sm90a"

_CPU_BODY = "return block == nullptr;"
_CUDA_HEAD = """
#include <cuda_fp16.h>
#ifdef __CUDA_NO_HALF_OPERATORS__
#error "half operators are off"
#endif
__global__ void reverse(float* data) {
  __shared__ float copy[64];
  copy[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  data[threadIdx.x] = copy[63 - threadIdx.x];
}
"""
_CUDA_BODY = "reverse<<<1, 64>>>((float*)block); return static_cast<int>(cudaGetLastError());"


def kernel_source(
    slug: str = CPU_SLUG, *, extra: str = "", abi: int = LAUNCHER_ABI, says: str | None = None
) -> RenderedSource:
    """A source that builds; `says` is the identity that the library claims, if it is a lie."""
    config = OpConfig.parse(slug)
    identity = f"{slug}.forward"
    cuda = is_cuda(config.arch)
    text = f"""{_CUDA_HEAD if cuda else ""}
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT int rwkv_jit_abi(void) {{ return {abi}; }}
EXPORT const char* rwkv_jit_identity(void) {{ return "{says or identity}"; }}
EXPORT int rwkv_jit_launch(const void* block) {{ {_CUDA_BODY if cuda else _CPU_BODY} }}
EXPORT const char* rwkv_jit_error(int) {{ return ""; }}
{extra}
"""
    return RenderedSource(
        config=config,
        entry="forward",
        identity=identity,
        text=text,
        suffix=".cu" if cuda else ".cpp",
    )
