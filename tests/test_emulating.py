"""The emulator of CUDA kernels: what it computes, and which mistakes it finds."""

from __future__ import annotations

import ctypes
import platform
import shutil
from pathlib import Path

import pytest
import torch

from emulating import build, translate

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("g++") is None, reason="needs g++ on x86-64"
)

# A kernel of one block, and what launches it.
FRAME = """
#include <cuda_runtime.h>
#include <cuda_bf16.h>
#define EXPORT extern "C" __attribute__((visibility("default")))
__global__ void kernel(float* data) {
  extern __shared__ __align__(16) float memory[];
  const int thread = threadIdx.x;
  %s
}
EXPORT int launch(float* data) {
  kernel<<<1, 64, 1024, nullptr>>>(data);
  return cudaGetLastError();
}
EXPORT const char* error() { return cudaGetErrorString(cudaGetLastError()); }
"""
MMA = """
  unsigned a[4], b[2];
  float sum[4] = {};
  const int g = thread % 32 / 4, q = thread % 4 * 2;
  for (int at = 0; at < 4; ++at) {
    const float* row = data + (g + at % 2 * 8) * 16 + q + at / 2 * 8;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(a[at]) : "f"(row[1]), "f"(row[0]));
  }
  for (int at = 0; at < 2; ++at) {
    const float* column = data + 256 + (q + at * 8) * 8 + g;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(b[at]) : "f"(column[8]), "f"(column[0]));
  }
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  if (thread < 32)
    for (int at = 0; at < 4; ++at) data[384 + (g + at / 2 * 8) * 8 + q + at % 2] = sum[at];
"""
MMA_TF32 = """
  unsigned a[4], b[2];
  float sum[4] = {};
  const int g = thread % 32 / 4, q = thread % 4;
  for (int at = 0; at < 4; ++at)
    ROUND("=r"(a[at]) : "f"(data[(g + at % 2 * 8) * 8 + q + at / 2 * 4]));
  for (int at = 0; at < 2; ++at)
    ROUND("=r"(b[at]) : "f"(data[128 + (q + at * 4) * 8 + g]));
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  if (thread < 32)
    for (int at = 0; at < 4; ++at) data[192 + (g + at / 2 * 8) * 8 + 2 * q + at % 2] = sum[at];
"""
COPY = """
  const unsigned to = __cvta_generic_to_shared(memory + thread * 4);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               ::"r"(to), "l"(data + thread % 32 * 4), "r"(thread < 32 ? 16 : 0));
"""
DONE = 'asm volatile("cp.async.wait_all;"); __syncthreads();'


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("built")


def run(body: str, data: torch.Tensor, folder: Path, *, seed: int = 0) -> str:
    """Run a kernel of 64 threads with 1024 bytes of shared memory; what went wrong."""
    library = ctypes.CDLL(str(build(FRAME % body, folder, checked=True)))
    library.error.restype = ctypes.c_char_p
    library.emulator_begin(seed)
    address = ctypes.c_void_p(data.data_ptr())
    library.emulator_allow(address, ctypes.c_size_t(data.nbytes), 1)
    failed = library.launch(address)
    message: str = library.error().decode()
    assert bool(failed) == bool(message)
    return message


def test_threads_meet_and_see_what_others_wrote(built: Path) -> None:
    data = torch.arange(64.0)
    body = "memory[thread] = data[thread]; __syncthreads(); data[thread] = memory[63 - thread];"
    for seed in range(5):
        assert run(body, data, built, seed=seed) == ""
    assert torch.equal(data, torch.arange(63.0, -1, -1))


def test_lanes_exchange_registers(built: Path) -> None:
    data = torch.arange(64.0)
    assert run("data[thread] = __shfl_xor_sync(~0u, data[thread], 3);", data, built) == ""
    assert torch.equal(data, torch.arange(64.0)[torch.arange(64) ^ 3])


def test_a_product_on_tensor_cores_is_that_of_the_rounded_matrices(built: Path) -> None:
    data = torch.randn(384 + 128)
    left, right = data[:256].view(16, 16), data[256:384].view(16, 8)
    expected = left.bfloat16().float() @ right.bfloat16().float()
    assert run(MMA, data, built) == ""
    torch.testing.assert_close(data[384:].view(16, 8), expected)


def to_tf32(x: torch.Tensor) -> torch.Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_a_product_of_tf32_takes_what_is_rounded_to_it(built: Path) -> None:
    data = torch.randn(192 + 128)
    left, right = data[:128].view(16, 8), data[128:192].view(8, 8)
    expected = to_tf32(left) @ to_tf32(right)
    assert run(MMA_TF32.replace("ROUND(", 'asm("cvt.rna.tf32.f32 %0, %1;" : '), data, built) == ""
    torch.testing.assert_close(data[192:].view(16, 8), expected)
    assert "not rounded to it" in run(
        MMA_TF32.replace("ROUND(", 'asm("mov.b32 %0, %1;" : '), data, built
    )


def test_copies_come_when_they_are_waited_for_and_zeros_where_there_is_nothing(
    built: Path,
) -> None:
    data = torch.arange(128.0)
    body = f"{COPY} {DONE} const float late = memory[255 - thread]; data[thread] = late;"
    assert run(body, data, built) == ""
    assert torch.equal(data[:64], torch.zeros(64))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("memory[thread] = 1.0f; data[thread] = memory[63 - thread];", "with nothing between"),
        ("memory[thread] = 1.0f; __syncwarp(); data[thread] = memory[63 - thread];", "between"),
        ("data[thread] = memory[thread]; __syncwarp(); memory[63 - thread] = 1.0f;", "between"),
        ("if (thread != 5) __syncthreads();", "stands still"),
        ("if (thread % 32 == 5) __syncwarp(); else __shfl_sync(~0u, 1.0f, 0);", "other lanes"),
        ("if (thread == 1) memory[2000] = 1.0f;", "outside of shared memory and of every tensor"),
        ("if (thread == 1) data[100000] = 1.0f;", "outside of shared memory and of every tensor"),
        (
            "*reinterpret_cast<float2*>(data + 2 * thread + 1) = *reinterpret_cast<float2*>(data);",
            "no multiple of that",
        ),
        (COPY, "ends without waiting for its copies"),
        (f"{COPY} __syncthreads(); data[thread] = memory[thread]; {DONE}", "nothing between"),
        ('asm volatile("bar.sync %0, %1;" ::"r"(16), "n"(64) : "memory");', "no barrier 16"),
    ],
)
def test_a_mistake_is_found_in_any_order_of_the_warps(built: Path, body: str, said: str) -> None:
    for seed in range(3):
        assert said in run(body, torch.zeros(256), built, seed=seed)


def test_an_instruction_becomes_a_call_with_its_results_first() -> None:
    statement = 'asm volatile("bar.sync %0, %1;" ::"r"(base::of(a, b)), "n"(N) : "memory");'
    assert translate(statement) == "ptx::bar_sync(base::of(a, b), N);"
    statement = 'asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y[0]) : "f"(x));'
    assert translate(statement) == "ptx::ex2_approx_ftz_f32(y[0], x);"
