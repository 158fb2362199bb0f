"""Who is measured: ours, the loop, peers that are there, and why others are not."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rwkv_jit.bench import contenders
from rwkv_jit.bench.cases import Case
from rwkv_jit.bench.contenders import (
    LOOP,
    OURS,
    Absentee,
    Contender,
    line_up,
    ours,
    peer_of_file,
    peers,
)
from rwkv_jit.bench.gate import LIMITS
from rwkv_jit.bench.inputs import draw
from rwkv_jit.config import OpConfig
from rwkv_jit.errors import BenchError, ConfigError
from rwkv_jit.ops import get_spec
from rwkv_jit.settings import Settings

SUM = "import torch\ndecay = 'logit'\ndef call(r, w, k, v, a, b): return r + torch.sigmoid(w)"


@pytest.fixture
def peer_file(tmp_path: Path) -> Path:
    return tmp_path / "my_kernel.py"


def test_ours_is_first_and_the_loop_runs_on_a_cpu(case: Case) -> None:
    first, second = line_up(case, "cpu", known_peers=False, peer_files=())
    assert isinstance(first, Contender)
    assert isinstance(second, Contender)
    assert (first.name, second.name) == (OURS, LOOP)
    assert first.kernels == {"forward": "wkv7_forward.cpp", "backward": "wkv7_backward.cpp"}
    assert second.limit == LIMITS["fp32"]


def test_what_no_kernel_serves_is_refused(case: Case) -> None:
    with pytest.raises(ConfigError, match="operator 'wkv9' does not exist"):
        ours(Case(op="wkv9", shape=case.shape, dtype="fp32"), "cpu")


def test_the_reference_mode_has_no_kernels_to_measure(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contenders, "current_settings", lambda: Settings(mode="reference"))
    with pytest.raises(BenchError, match="RWKV_JIT_MODE=reference runs no kernels"):
        ours(case, "cpu")


def test_peers_that_are_not_installed_say_so(
    config: OpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None in this table makes an import fail.
    monkeypatch.setitem(sys.modules, "rwkv7_hf", None)
    monkeypatch.setitem(sys.modules, "rwkv7_hf.ops_rwkv7", None)
    found = {peer.name: peer for peer in peers(config)}
    assert found["fla"] == Absentee(name="fla", status="missing", why="runs on a GPU only")
    missing = found["rwkv7-hf"]
    assert isinstance(missing, Absentee)
    assert missing.status == "missing"
    assert "rwkv7_hf" in missing.why


def test_fla_is_called_with_the_logarithm_of_the_decay_and_no_scale(
    case: Case, config: OpConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, object] = {}

    def chunk_rwkv7(**call: object) -> tuple[object, None]:
        given.update(call)
        return call["r"], None

    module = ModuleType("fla.ops.rwkv7")
    module.chunk_rwkv7 = chunk_rwkv7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "fla.ops.rwkv7", module)
    for parent in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    on_gpu = OpConfig(op="wkv7", head_size=8, dtype="bf16", chunk_length=16, arch="sm90a")
    fla = next(peer for peer in peers(on_gpu) if peer.name == "fla")
    assert isinstance(fla, Contender)
    assert fla.config.decay == "log"
    assert fla.limit == LIMITS["bf16"]
    tensors = draw(get_spec("wkv7"), config, case.shape, "cpu")
    (y,) = fla.call(tensors)
    assert y is tensors["r"]
    assert given == {**tensors, "scale": 1.0}


def test_a_file_makes_a_peer_of_any_kernel(case: Case, config: OpConfig, peer_file: Path) -> None:
    peer_file.write_text(SUM)
    peer = peer_of_file(peer_file, config)
    assert isinstance(peer, Contender)
    assert (peer.name, peer.config.decay) == ("my_kernel", "logit")
    tensors = draw(get_spec("wkv7"), peer.config, case.shape, "cpu")
    (y,) = peer.call(tensors)
    assert torch.equal(y, tensors["r"] + torch.sigmoid(tensors["w"]))


def test_a_file_for_another_operator_is_left_out(config: OpConfig, peer_file: Path) -> None:
    peer_file.write_text(f"{SUM}\nop = 'wkv6'")
    assert peer_of_file(peer_file, config) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("decay = 'log'", "AttributeError: .* has no attribute 'call'"),
        ("def call(*x): pass", "AttributeError: .* has no attribute 'decay'"),
        (SUM.replace("logit", "none"), "ConfigError: wkv7: decay='none' is not known; choose"),
    ],
)
def test_a_file_that_is_no_peer_says_why(
    config: OpConfig, peer_file: Path, text: str, why: str
) -> None:
    peer_file.write_text(text)
    peer = peer_of_file(peer_file, config)
    assert isinstance(peer, Absentee)
    assert peer.status == "failed"
    assert re.match(why, peer.why)
