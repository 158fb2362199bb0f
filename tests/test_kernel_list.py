"""Lists of kernels: what a program used is read back for building it elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from running import run_json
from rwkv_jit.arch import host_cpu_arch
from rwkv_jit.cli.planning import plan_from
from rwkv_jit.config import OpConfig
from rwkv_jit.errors import ConfigError
from rwkv_jit.kernel_list import read_kernels, write_kernels

NAME = f"wkv7_n8_fp32_l16_{host_cpu_arch()}.forward"


def test_a_list_reads_back_as_it_was(tmp_path: Path) -> None:
    write_kernels(tmp_path / "used.json", [NAME])
    slug, _, entry = NAME.partition(".")
    assert read_kernels(tmp_path / "used.json") == [(OpConfig.parse(slug), entry)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"schema": 2, "kernels": []}',
        '{"schema": 1, "kernels": {}}',
        '{"schema": 1, "kernels": [1]}',
        '{"schema": 1, "kernels": ["wkv7_n8_fp32_l16_sm80"]}',
        '{"schema": 1, "kernels": ["wkv7_n8_fp32_l16_sm80.sideways"]}',
    ],
)
def test_what_is_no_list_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "used.json").write_text(text)
    with pytest.raises(ConfigError):
        read_kernels(tmp_path / "used.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_kernels(tmp_path / "missing.json")


def test_it_can_be_planned_for_other_architectures(tmp_path: Path) -> None:
    write_kernels(tmp_path / "used.json", ["wkv7_n64_bf16_l16_sm90a.forward"])
    planned = plan_from(tmp_path / "used.json", ["sm80", "sm120f"])
    assert [source.identity for source in planned] == [
        "wkv7_n64_bf16_l16_sm80.forward",
        "wkv7_n64_bf16_l16_sm120f.forward",
    ]


def test_warm_takes_it(tmp_path: Path) -> None:
    write_kernels(tmp_path / "used.json", [NAME])
    (outcome,) = run_json("warm", "--from", str(tmp_path / "used.json"))
    assert outcome["kernel"] == NAME
    assert outcome["status"] in ("built", "hit")
