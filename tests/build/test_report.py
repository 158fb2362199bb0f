"""Reading compilers' words."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_jit.build.report import compile_command, failed_step, first_error, hint, kernel_resources

PTXAS = """[1/2] /opt/nvcc -O3 -c /s/source.cu -o source.cuda.o
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size, 1024 bytes smem
ptxas info    : Compile time = 3.000 ms
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_90a'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers
[2/2] c++ source.cuda.o -shared -o x.so
"""


def test_resources_are_those_of_each_kernel() -> None:
    assert kernel_resources(PTXAS) == {
        "_Z1aPf": {
            "registers": 255,
            "spill_stores": 8,
            "spill_loads": 4,
            "shared": 1024,
            "stack": 16,
        },
        "_Z1bPf": {
            "registers": 8,
            "spill_stores": 0,
            "spill_loads": 0,
            "shared": 0,
            "stack": 0,
        },
    }


def test_log_without_kernels_has_no_resources() -> None:
    assert kernel_resources("[1/2] c++ -c x.cpp\n") == {}


def test_command_is_the_first_step() -> None:
    assert compile_command(PTXAS) == "/opt/nvcc -O3 -c /s/source.cu -o source.cuda.o"
    assert compile_command("nothing ran") == ""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ('x\n/s/source.cu(41): error: identifier "foo" is undefined\nmore', "source.cu(41): error"),
        ("/s/source.cpp:3:5: error: 'foo' was not declared", "source.cpp:3:5: error"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_999'", "nvcc fatal   : Unsupported"),
        ("only\nthis", "this"),
        ("", ""),
    ],
)
def test_first_error_is_found_and_has_no_folder(log: str, expected: str) -> None:
    found = first_error(log, Path("/s"))
    assert found.startswith(expected)
    assert "/s/" not in found


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("FAILED: [code=2] source.cuda.o \n", ("nvcc", 2)),
        ("FAILED: source.cuda.o \n", ("nvcc", None)),
        ("FAILED: [code=1] rwkv_jit_1.so \n", ("the linker", 1)),
        ("Traceback", ("the build worker", None)),
    ],
)
def test_failed_step_names_program_and_status(log: str, expected: tuple[str, int | None]) -> None:
    assert failed_step(log, "nvcc") == expected


@pytest.mark.parametrize(
    ("log", "word"),
    [
        ("fatal error: error writing to /tmp/x.s: No space left on device", "disk is full"),
        ("c++: fatal error: Killed signal terminated program cc1plus", "MAX_JOBS"),
        ("nvcc fatal   : Unsupported gpu architecture 'compute_999'", "newer toolkit"),
        ("source.cu:1:10: fatal error: nope.h: No such file or directory", "header is missing"),
        ("/usr/bin/ld: cannot find -lcudart: No such file", "libcudart is missing"),
        ("error: bad value ('x86-64-v9') for '-march=' switch", "CPU level"),
        ("error: something else", ""),
    ],
)
def test_hint_is_given_where_one_is_known(log: str, word: str) -> None:
    assert word in hint(log)
    assert bool(hint(log)) == bool(word)
