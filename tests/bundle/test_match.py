"""Matching: by meaning, the exact architecture first, and a reason for each that does not serve."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bundles import fake_bundle, source_of
from rwkv_jit import spec
from rwkv_jit.bundle import Bundle, explain_near, find_in, match, nearest
from rwkv_jit.errors import BundleError
from rwkv_jit.ops import SPECS, get_spec


def slug(arch: str, dtype: str = "fp16", size: int = 64) -> str:
    return f"wkv7_n{size}_{dtype}_l16_{arch}"


def found(wanted: str, *bundles: Bundle) -> str | None:
    """The identity of what serves a kernel."""
    result = find_in(source_of(wanted), bundles, strict=True)
    if result is None:
        return None
    assert result.entry.manifest.identity == result.source.identity
    return result.source.identity.removesuffix(".forward")


@pytest.fixture(autouse=True)
def torch_has_cuda_13(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(match, "torch_cuda_major", lambda: 13)


def test_the_exact_architecture_comes_first_even_in_a_later_bundle(tmp_path: Path) -> None:
    first = fake_bundle(tmp_path / "first", [slug("sm80")])
    second = fake_bundle(tmp_path / "second", [slug("sm86")])
    assert found(slug("sm86"), first, second) == slug("sm86")
    assert found(slug("sm89"), first, second) == slug("sm86")
    assert found(slug("sm80"), first, second) == slug("sm80")


def test_the_first_bundle_that_has_it_answers(tmp_path: Path) -> None:
    bundles = [fake_bundle(tmp_path / name, [slug("sm80")]) for name in ("a", "b")]
    result = find_in(source_of(slug("sm80")), bundles, strict=True)
    assert result is not None
    assert result.bundle is bundles[0]


@pytest.mark.parametrize(
    ("wanted", "has", "served"),
    [
        ("sm86", ["sm80"], "sm80"),
        ("sm89", ["sm80", "sm86"], "sm86"),
        ("sm80", ["sm86"], None),
        ("sm90a", ["sm90"], "sm90"),
        ("sm100", ["sm90a"], None),
        ("sm121", ["sm120a"], None),
        ("sm121", ["sm120", "sm120f"], "sm120f"),
        ("sm120", ["sm100f"], None),
    ],
)
def test_a_gpu_binary_serves_its_major_version_upwards(
    tmp_path: Path, wanted: str, has: list[str], served: str | None
) -> None:
    bundle = fake_bundle(tmp_path / "bundle", [slug(arch) for arch in has])
    assert found(slug(wanted), bundle) == (None if served is None else slug(served))


@pytest.mark.parametrize(
    ("wanted", "has", "served"),
    [
        ("x86_64_v4", ["x86_64_v2", "x86_64_v3"], "x86_64_v3"),
        ("x86_64_v2", ["x86_64_v3"], None),
    ],
)
def test_a_cpu_binary_serves_higher_levels(
    tmp_path: Path, wanted: str, has: list[str], served: str | None
) -> None:
    bundle = fake_bundle(tmp_path / "bundle", [slug(arch, "fp32") for arch in has])
    assert found(slug(wanted, "fp32"), bundle) == (served and slug(served, "fp32"))


def test_a_kernel_that_is_called_in_another_way_does_not_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = fake_bundle(tmp_path / "bundle", [slug("sm80")])
    assert found(slug("sm86"), bundle) == slug("sm80")
    spacing = {"sm80": 16, "sm86": 32}
    monkeypatch.setattr(
        type(get_spec("wkv7")), "checkpoint_spacing", lambda _self, config, _: spacing[config.arch]
    )
    assert found(slug("sm86"), bundle) is None


def test_a_kernel_that_needs_more_than_the_gpu_has_does_not_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = fake_bundle(tmp_path / "bundle", [slug("sm80")])
    big = dataclasses.replace(get_spec("wkv7").variant(source_of(slug("sm80")).config, "forward"))
    assert big.runs_on("sm86")
    monkeypatch.setattr(spec, "shared_memory", lambda arch: 1 << 20 if arch == "sm80" else 0)
    big = dataclasses.replace(big, shared_bytes=100_000)
    monkeypatch.setitem(
        SPECS, "wkv7", dataclasses.replace(SPECS["wkv7"], variants=(big, *SPECS["wkv7"].variants))
    )
    assert found(slug("sm80"), bundle) == slug("sm80")
    assert found(slug("sm86"), bundle) is None
    near = nearest(source_of(slug("sm86")), [bundle])
    assert near is not None
    assert "it is for 8.0, and 8.6 takes another kernel" in explain_near(near)


REASONS = [
    ({"source": "0" * 64}, "its source is that of another version of rwkv_jit"),
    ({"abi": "999"}, "it has abi=999 instead of"),
    ({"platform": "plan9-mips"}, "it has platform=plan9-mips instead of"),
    ({"cuda_major": "12"}, "it needs CUDA 12, but torch here was built with CUDA 13"),
]


@pytest.mark.parametrize(("fields", "reason"), REASONS)
def test_every_part_of_the_meaning_counts_and_is_told(
    tmp_path: Path, fields: dict[str, str], reason: str
) -> None:
    bundle = fake_bundle(tmp_path / "bundle", [slug("sm80")], fields=fields)
    for wanted in ("sm80", "sm86"):
        assert found(slug(wanted), bundle) is None
        near = nearest(source_of(slug(wanted)), [bundle])
        assert near is not None
        assert list(near.differs) == list(fields)
        assert reason in explain_near(near)


def test_who_built_it_does_not_count(tmp_path: Path) -> None:
    bundle = fake_bundle(tmp_path / "bundle", [slug("sm80")], fields={"nvcc": "another"})
    assert found(slug("sm80"), bundle) == slug("sm80")


def test_a_torch_without_cuda_takes_any_major(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(match, "torch_cuda_major", lambda: None)
    bundle = fake_bundle(tmp_path / "bundle", [slug("sm80")], cuda_major=12)
    assert found(slug("sm80"), bundle) == slug("sm80")


def test_of_several_majors_that_of_torch_is_taken(tmp_path: Path) -> None:
    bundles = [
        fake_bundle(tmp_path / str(major), [slug("sm80")], cuda_major=major) for major in (12, 13)
    ]
    result = find_in(source_of(slug("sm80")), bundles, strict=True)
    assert result is not None
    assert result.bundle is bundles[1]


@pytest.mark.parametrize(
    ("has", "knobs"),
    [
        (slug("sm80", size=128), {"head_size": ("64", "128")}),
        (slug("sm80", "bf16"), {"dtype": ("fp16", "bf16")}),
        (f"{slug('sm80')}_log", {"decay": ("loglog", "log")}),
        (slug("sm90a"), {"arch": ("sm80", "sm90a")}),
        (f"{slug('sm80')}.backward", {"entry": ("forward", "backward")}),
    ],
)
def test_the_nearest_entry_is_told_by_its_knobs(
    tmp_path: Path, has: str, knobs: dict[str, tuple[str, str]]
) -> None:
    far = slug("x86_64_v3", "fp32", 8)
    bundle = fake_bundle(tmp_path / "bundle", [far, has])
    near = nearest(source_of(slug("sm80")), [bundle])
    assert near is not None
    assert near.differs == knobs
    assert explain_near(near).count(" instead of ") == ("arch" not in knobs)


def test_nothing_is_near_in_no_bundle() -> None:
    assert nearest(source_of(slug("sm80")), []) is None


def test_a_damaged_kernel_is_passed_over_with_a_warning_or_an_error(tmp_path: Path) -> None:
    bad, good = (fake_bundle(tmp_path / name, [slug("sm80")]) for name in ("bad", "good"))
    (bad.folder(bad.index.entries[0]) / "kernel.so").write_bytes(b"")
    source = source_of(slug("sm80"))
    with pytest.warns(RuntimeWarning, match="passed over") as caught:
        result = find_in(source, [bad, good], strict=False)
    assert len(caught) == 1
    assert result is not None
    assert result.bundle is good
    with pytest.raises(BundleError, match="has 0 bytes"):
        find_in(source, [bad, good], strict=True)
