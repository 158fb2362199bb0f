"""Which kernels a choice of knobs asks for."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import pytest

from rwkv_jit.arch import host_cpu_arch
from rwkv_jit.cli.planning import Choices, default_archs, plan, plan_all, plan_from
from rwkv_jit.errors import ConfigError
from rwkv_jit.kernel_list import write_kernels
from rwkv_jit.settings import Settings


def identities(choices: Choices) -> list[str]:
    return [source.identity for source in plan(choices)]


def test_archs_come_from_the_list_and_bare_ones_are_those_that_devices_ask_for() -> None:
    settings = Settings(cuda_arch_list=("8.0", "9.0", "8.0", "10.0f"))
    assert default_archs(settings) == ("sm80", "sm90a", "sm100f")


def test_archs_of_the_list_that_no_kernel_runs_on_are_skipped_with_a_warning() -> None:
    with pytest.warns(RuntimeWarning, match=r"arch='7.0' is too old.*it is skipped"):
        assert default_archs(Settings(cuda_arch_list=("7.0", "8.6"))) == ("sm86",)


def test_a_list_without_any_usable_arch_is_an_error() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(ConfigError, match=r"arch='7.0' is too old"):
            default_archs(Settings(cuda_arch_list=("7.0",)))


def test_without_a_list_and_a_gpu_the_arch_is_that_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rwkv_jit.cli.planning.gpu_archs", lambda: ())
    assert default_archs(Settings()) == (host_cpu_arch(),)
    monkeypatch.setattr("rwkv_jit.cli.planning.gpu_archs", lambda: ("sm90a",))
    assert default_archs(Settings()) == ("sm90a",)


def test_the_default_dtype_is_bf16_for_cuda_and_fp32_for_a_cpu() -> None:
    choices = Choices(archs=("sm80", "x86_64_v2"), ops=("wkv7",), entries=("forward",))
    assert identities(choices) == [
        "wkv7_n64_bf16_l16_sm80.forward",
        "wkv7_n64_fp32_l16_x86_64_v2.forward",
    ]


def test_every_combination_is_planned_once() -> None:
    choices = Choices(
        archs=("sm80", "sm90a"),
        ops=("wkv7", "wkv7"),
        head_sizes=(64, 128),
        dtypes=("bf16", "fp32"),
        chunk_lengths=(16, 32),
        decays=("loglog", "log"),
        state_layouts=("vk", "kv"),
    )
    assert len(set(identities(choices))) == len(identities(choices)) == 2**7


def test_a_bound_is_declared_where_a_kernel_makes_use_of_it(tmp_path: Path) -> None:
    entry = {"archs": ("sm90a",), "entries": ("forward",)}
    assert "wkv5_n64_bf16_l16_sm90a.forward" in identities(Choices(**entry, lower_bound=-0.61))
    named = {**entry, "ops": ("wkv7",)}
    (bounded,) = identities(Choices(**named, lower_bound=-8.0))
    assert bounded == "wkv7_n64_bf16_l16_sm90a_bounded.forward"
    assert identities(Choices(**named, lower_bound=-11.0)) == identities(Choices(**named))
    with pytest.raises(ConfigError, match=r"lower_bound=1\.0 must be a number of at most 0"):
        plan(Choices(**named, lower_bound=1.0))
    path = tmp_path / "kernels.json"
    write_kernels(path, [bounded])
    assert [source.identity for source in plan_from(path, ())] == [bounded]
    (elsewhere,) = plan_from(path, ("x86_64_v2",))
    assert elsewhere.identity == "wkv7_n64_bf16_l16_x86_64_v2.forward"


def test_tf32_is_planned_where_a_kernel_rounds_to_it(tmp_path: Path) -> None:
    choices = Choices(
        archs=("sm90a",), dtypes=("fp32", "bf16"), entries=("forward",), precision="tf32"
    )
    found = identities(dataclasses.replace(choices, ops=("wkv7", "wkv6")))
    assert found == [
        "wkv7_n64_fp32_l16_sm90a_tf32.forward",
        "wkv6_n64_fp32_l16_sm90a.forward",
        "wkv7_n64_bf16_l16_sm90a.forward",
        "wkv6_n64_bf16_l16_sm90a.forward",
    ]
    path = tmp_path / "kernels.json"
    write_kernels(path, found[:1])
    (elsewhere,) = plan_from(path, ("x86_64_v2",))
    assert elsewhere.identity == "wkv7_n64_fp32_l16_x86_64_v2.forward"
    with pytest.raises(ConfigError, match=r"precision='bf16' is not known; choose from float32, t"):
        plan(dataclasses.replace(choices, precision="bf16"))


def test_no_named_operator_means_all() -> None:
    ops = {name.partition("_")[0] for name in identities(Choices(archs=("sm80",)))}
    assert "wkv7" in ops


def test_a_combination_that_no_kernel_serves_is_an_error() -> None:
    with pytest.raises(ConfigError, match="head_size=65 is not supported on sm_80"):
        plan(Choices(archs=("sm80",), ops=("wkv7",), head_sizes=(64, 65)))
    with pytest.raises(ConfigError, match="dtype=fp64 is not supported on sm_80"):
        plan(Choices(archs=("sm80",), dtypes=("bf16", "fp64")))


def test_knobs_that_an_operator_has_not_are_passed_over() -> None:
    choices = Choices(archs=("sm80",), ops=("a_gate", "kk_pre"), head_sizes=(64, 65))
    assert set(identities(choices)) == {
        f"{slug}_bf16_sm80.{entry}"
        for slug in ("a_gate", "kk_pre_n64", "kk_pre_n65")
        for entry in ("forward", "backward")
    }


def test_all_head_sizes_of_a_step_are_those_of_recurrences() -> None:
    sources = plan_all(("kk_pre", "a_gate"), ("sm80",))
    of_heads = [source.config for source in sources if source.config.op == "kk_pre"]
    assert {config.head_size for config in of_heads} == {16, 32, 64, 128, 256}
    assert len(sources) == (5 + 1) * 3 * 2


def test_unknown_operators_and_entries_are_errors_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="operator 'wkv9' does not exist; choose from"):
        plan(Choices(archs=("sm80",), ops=("wkv9",)))
    with pytest.raises(ConfigError, match="entry='sideways' does not exist; choose from forward"):
        plan(Choices(archs=("sm80",), ops=("wkv7",), entries=("sideways",)))
