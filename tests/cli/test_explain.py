"""`rwkv-jit explain`: which layer answers, and how the nearest that does not differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from bundles import fake_bundle, fake_entry, source_of
from running import run, run_json
from rwkv_jit.cache import Cache, cache_key
from rwkv_jit.settings import current_settings
from rwkv_jit.toolchain import find_toolchain

NAME = "wkv7_n64_fp32_l16_x86_64_v3"


@pytest.fixture
def bundle(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In force, with one kernel."""
    root = fake_bundle(tmp_path / "bundle", [NAME]).root
    monkeypatch.setenv("RWKV_JIT_BUNDLE_PATH", str(root))
    current_settings.cache_clear()
    return root


def prebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RWKV_JIT_MODE", "prebuilt")
    current_settings.cache_clear()


def test_a_bundle_answers(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (told,) = run_json("explain", f"{NAME}.forward")
    assert told["answer"] == "bundle"
    assert told["layers"][0]["where"] == str(bundle)
    assert [layer["name"] for layer in told["layers"]] == ["bundle", "cache", "build"]
    prebuilt(monkeypatch)
    assert run_json("explain", f"{NAME}.forward")[0]["answer"] == "bundle"


def test_a_binary_of_another_architecture_answers_and_is_named(bundle: Path) -> None:
    (told,) = run_json("explain", f"{NAME.replace('v3', 'v4')}.forward")
    assert told["answer"] == "bundle"
    assert f"has {NAME}.forward, whose binary runs here" in told["layers"][0]["said"]


def test_what_would_be_built_says_how_the_nearest_differ(bundle: Path) -> None:
    (told,) = run_json("explain", f"{NAME}.backward")
    assert told["answer"] == "build"
    assert told["layers"][0]["differs"] == {"entry": ["backward", "forward"]}
    assert "rwkv-jit warm wkv7" in told["layers"][2]["said"]
    (told,) = run_json("explain", f"{NAME}_log.forward")
    assert told["layers"][0]["differs"] == {"decay": ["log", "loglog"]}


def test_nothing_answers_where_it_is_not_there_and_must_not_be_built(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prebuilt(monkeypatch)
    result = run("explain", NAME, code=1)
    assert f"{NAME}.forward  from: bundle" in result.stdout
    assert f"{NAME}.backward  from: nothing" in result.stdout
    assert "forbids building" in result.stdout


def test_the_cache_answers_or_names_the_field_that_differs(own_cache: Path) -> None:
    name = "wkv7_n64_fp32_l16_x86_64_v2"
    settings = current_settings()
    fields = cache_key(source_of(name), find_toolchain("x86_64_v2", settings)).fields
    cache = Cache.open(settings)
    for changes in ({"host_compiler": "gcc 1.0"}, {}):
        staging = cache.new_staging()
        staging.rmdir()
        made = fake_entry(staging.parent / "made", name, fields={**fields, **changes})
        made.path.rename(staging)
        cache.publish(staging, made.manifest.digest)
        (told,) = run_json("explain", f"{name}.forward")
        layer = told["layers"][0]
        assert layer["name"] == "cache"
        if changes:
            assert told["answer"] == "build"
            assert layer["differs"] == {"host_compiler": [fields["host_compiler"], "gcc 1.0"]}
        else:
            assert told["answer"] == "cache"


def test_a_bundle_that_is_refused_says_why(bundle: Path) -> None:
    (bundle / "bundle.json").write_text("{}")
    (told,) = run_json("explain", f"{NAME}.forward")
    assert told["answer"] == "build"
    assert "bundle.json has schema None" in told["layers"][0]["said"]


def test_explaining_changes_nothing(bundle: Path, own_cache: Path) -> None:
    run("explain", NAME)
    assert not own_cache.exists()


@pytest.mark.parametrize(("mode", "answer"), [("reference", "reference"), ("rebuild", "build")])
def test_the_mode_counts(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, mode: str, answer: str
) -> None:
    monkeypatch.setenv("RWKV_JIT_MODE", mode)
    current_settings.cache_clear()
    assert run_json("explain", f"{NAME}.forward")[0]["answer"] == answer


def test_warm_builds_nothing_that_a_bundle_has(bundle: Path, own_cache: Path) -> None:
    options = ("wkv7", "--arch", "x86_64_v3", "--dtype", "fp32", "--entry", "forward")
    (outcome,) = run_json("warm", *options)
    assert outcome["status"] == "hit"
    assert Path(outcome["library"]).is_relative_to(bundle)
    assert run_json("warm", *options, "--dry-run") == [outcome]
    assert not own_cache.exists()
