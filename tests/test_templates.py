"""The templates themselves: what they may use, and that they compile for every architecture."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

import jinja2
import jinja2.meta
import pytest

from rwkv_jit.arch import CUDA_ARCHES, host_cpu_arch
from rwkv_jit.build import kernel_resources
from rwkv_jit.config import OpConfig
from rwkv_jit.errors import ToolchainError
from rwkv_jit.ops import ELEMENTWISE, SPECS
from rwkv_jit.render import render, template_dir, template_variables
from rwkv_jit.settings import Settings
from rwkv_jit.toolchain import find_toolchain

CUDA_HEAD_SIZES = (16, 32, 64, 128, 256)


def undeclared(name: str) -> set[str]:
    """The variables of a template and of the templates that it includes."""
    environment = jinja2.Environment(line_statement_prefix="//%")
    tree = environment.parse((template_dir() / name).read_text())
    found = set(jinja2.meta.find_undeclared_variables(tree))
    for included in jinja2.meta.find_referenced_templates(tree):
        assert included is not None
        found |= undeclared(included)
    return found


def example_kernels() -> list[tuple[OpConfig, str]]:
    """One configuration of each variant of each operator, with each entry."""
    configs = [
        OpConfig(
            op=spec.name,
            head_size=variant.head_sizes[0],
            dtype=variant.dtypes[0],
            chunk_length=variant.chunk_lengths[0],
            arch=f"sm{variant.min_arch}" if variant.min_arch else host_cpu_arch(),
            precision="tf32" if variant.needs_tf32 else "float32",
        )
        for spec in SPECS.values()
        for variant in spec.variants
    ]
    return [(config, entry) for config in configs for entry in SPECS[config.op].entries]


@pytest.mark.parametrize(("config", "entry"), example_kernels(), ids=str)
def test_a_template_uses_exactly_what_the_renderer_passes(config: OpConfig, entry: str) -> None:
    spec = SPECS[config.op]
    passed = template_variables(spec, config, entry, "identity")
    assert undeclared(spec.variant(config, entry).template) == set(passed)
    assert all(isinstance(value, int | str) for value in passed.values())


def test_templates_are_almost_free_of_jinja_control_flow() -> None:
    for path in template_dir().glob("*"):
        if path.is_file():
            lines = path.read_text().splitlines()
            statements = [line.split() for line in lines if line.lstrip().startswith("//%")]
            control = sum(words[1] != "include" for words in statements)
            assert control <= 0.05 * len(lines), path.name


def test_template_files_are_short_and_narrow() -> None:
    for path in template_dir().rglob("*"):
        if path.is_file():
            lines = path.read_text().splitlines()
            assert len(lines) <= 400, path.name
            assert all(len(line) <= 100 for line in lines), path.name


def test_a_rendered_source_is_one_file_of_system_headers_only() -> None:
    for config, entry in example_kernels():
        source = render(SPECS[config.op], config, entry)
        includes = [line for line in source.text.splitlines() if line.startswith("#include")]
        assert includes
        assert all(line.startswith("#include <") for line in includes)
        assert not any("torch" in line or "Python.h" in line for line in includes)
        assert f'return "{config.slug}.{entry}";' in source.text


def compile_cuda(config: OpConfig, entry: str, folder: Path) -> dict[str, dict[str, int]]:
    """Compile for real and return the compiler's report of each kernel."""
    try:
        toolchain = find_toolchain(config.arch, Settings())
    except ToolchainError as error:
        pytest.skip(f"no CUDA compiler: {error}")
    source = folder / "kernel.cu"
    source.write_text(render(SPECS[config.op], config, entry).text)
    command = [
        str(toolchain.nvcc), "-ccbin", str(toolchain.host_compiler), *toolchain.code_flags,
        "-Werror", "all-warnings", "-cubin", "-o", str(folder / "kernel.cubin"), str(source),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return kernel_resources(result.stdout + result.stderr)


def assert_nothing_spills(config: OpConfig, entry: str, folder: Path) -> None:
    report = compile_cuda(config, entry, folder)
    assert report
    for name, resources in report.items():
        assert resources["spill_stores"] == resources["spill_loads"] == 0, name
        assert 0 < resources["registers"] <= 255, name


TARGETS = [
    *((arch, size, "bf16") for arch in CUDA_ARCHES for size in (64, 128)),
    *(("sm80", size, "fp16") for size in CUDA_HEAD_SIZES),
    *(("sm90a", size, "fp32") for size in (64, 128)),
    *((arch, 64, "fp32") for arch in ("sm80", "sm120")),
]
STEP_TARGETS = [
    *((arch, 64, "bf16") for arch in CUDA_ARCHES),
    *(("sm90a", size, "bf16") for size in (7, 48, 253)),
    *(("sm80", size, "fp32") for size in (64, 256)),
]
# wkv5 has the templates of wkv6, but for the decays on tensor cores, and prefill those of forwards.
FEWER_TARGETS = [*((arch, 64, "bf16") for arch in CUDA_ARCHES), ("sm80", 256, "fp16")]


@pytest.mark.parametrize(
    ("op", "entry", "arch", "size", "dtype"),
    [
        (op, entry, *row)
        for op, spec in SPECS.items()
        if spec.is_recurrence
        for row in (
            FEWER_TARGETS if op.startswith("wkv5") or "prefill" in spec.entries else TARGETS
        )
        for entry in spec.entries
    ],
)
def test_every_cuda_template_compiles_and_nothing_spills(
    op: str, arch: str, size: int, dtype: str, entry: str, tmp_path: Path
) -> None:
    config = OpConfig(op=op, head_size=size, dtype=dtype, chunk_length=16, arch=arch)
    assert_nothing_spills(config, entry, tmp_path)


@pytest.mark.parametrize("entry", ["forward", "backward"])
@pytest.mark.parametrize(
    ("op", "arch", "size", "dtype"),
    [
        (spec.name, arch, size if spec.knobs else 0, dtype)
        for spec in ELEMENTWISE
        for arch, size, dtype in STEP_TARGETS
        if spec.knobs or size == 64
    ],
)
def test_every_step_compiles_and_nothing_spills(
    op: str, arch: str, size: int, dtype: str, entry: str, tmp_path: Path
) -> None:
    config = OpConfig(op=op, head_size=size, dtype=dtype, arch=arch)
    assert_nothing_spills(config, entry, tmp_path)


@pytest.mark.parametrize("entry", ["forward", "backward"])
@pytest.mark.parametrize(
    ("arch", "dtype"),
    [*((arch, "bf16") for arch in CUDA_ARCHES), ("sm80", "fp16"), ("sm80", "fp32")],
)
def test_the_loss_compiles_and_nothing_spills(
    arch: str, dtype: str, entry: str, tmp_path: Path
) -> None:
    config = OpConfig(op="l2wrap_cross_entropy", dtype=dtype, arch=arch)
    assert_nothing_spills(config, entry, tmp_path)


@pytest.mark.parametrize("entry", SPECS["wkv7"].entries)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize(
    ("arch", "size"), [("sm80", 64), ("sm86", 64), ("sm90a", 64), ("sm90a", 128)]
)
def test_kernels_of_bounded_decays_compile_and_nothing_spills(
    arch: str, size: int, dtype: str, entry: str, tmp_path: Path
) -> None:
    config = OpConfig(
        op="wkv7", head_size=size, dtype=dtype, chunk_length=16, arch=arch, bounded=True
    )
    assert_nothing_spills(config, entry, tmp_path)


@pytest.mark.parametrize("entry", SPECS["wkv7"].entries)
@pytest.mark.parametrize("decay", ["loglog", "logit"])
@pytest.mark.parametrize("arch", ["sm80", "sm90a", "sm100"])
def test_kernels_of_tf32_compile_and_nothing_spills(
    arch: str, decay: str, entry: str, tmp_path: Path
) -> None:
    config = OpConfig.parse(f"wkv7_n64_fp32_l16_{arch}_tf32")
    assert_nothing_spills(dataclasses.replace(config, decay=decay), entry, tmp_path)


@pytest.mark.parametrize("state_dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", ["vk", "kv"])
@pytest.mark.parametrize("op", ["wkv7_decode", "wkv7_decode_fused"])
@pytest.mark.parametrize(("arch", "size"), [("sm80", 32), ("sm90a", 64), ("sm90a", 256)])
def test_no_order_or_dtype_of_a_pool_makes_a_kernel_spill(
    op: str, state_dtype: str, layout: str, arch: str, size: int, tmp_path: Path
) -> None:
    config = OpConfig(
        op=op,
        head_size=size,
        dtype="bf16",
        chunk_length=16,
        arch=arch,
        state_dtype=state_dtype,
        state_layout=layout,
    )
    assert_nothing_spills(config, "decode", tmp_path)
