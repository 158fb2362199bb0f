"""`rwkv-jit bundle ...`: what it makes, checks, shows and installs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bundles import contents, fake_bundle
from running import run, run_json
from rwkv_jit.arch import host_cpu_arch
from rwkv_jit.settings import current_settings

NAME = "wkv7_n64_fp32_l16_x86_64_v3"
SMALL = ("--op", "wkv7", "--arch", "cpu", "--head-size", "8", "--entry", "forward")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return fake_bundle(tmp_path / "bundle", [NAME, "wkv7_n64_bf16_l16_sm90a"]).root


def test_build_makes_a_bundle_and_an_archive(tmp_path: Path) -> None:
    made = run_json("bundle", "build", str(tmp_path / "out"), *SMALL, "--tar")
    assert made["kernels"] == 1
    assert not made["signed"]
    assert made["archive"] == str(tmp_path / "out.tar")
    run("bundle", "verify", str(tmp_path / "out"))
    (entry,) = run_json("bundle", "inspect", str(tmp_path / "out"))["entries"]
    assert entry["kernel"] == f"wkv7_n8_fp32_l16_{host_cpu_arch()}.forward"
    again = run_json("bundle", "build", str(tmp_path / "again"), *SMALL)
    assert again["digest"] == made["digest"]
    assert "--force" in run("bundle", "build", str(tmp_path / "out"), *SMALL, code=1).stderr
    run("bundle", "build", str(tmp_path / "out"), *SMALL, "--force")


def test_a_failed_build_makes_no_bundle(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    current_settings.cache_clear()
    result = run("bundle", "build", str(tmp_path / "out"), *SMALL, code=1)
    assert "no-such-compiler" in result.stderr
    assert not (tmp_path / "out").exists()


def test_build_takes_what_a_program_used(tmp_path: Path) -> None:
    used = tmp_path / "used.json"
    names = [f"wkv7_n8_fp32_l16_{host_cpu_arch()}.forward"]
    used.write_text(json.dumps({"schema": 1, "kernels": names}))
    made = run_json("bundle", "build", str(tmp_path / "out"), "--from", str(used))
    listed = run_json("bundle", "inspect", made["path"])["entries"]
    assert [entry["kernel"] for entry in listed] == names


def test_verify_tells_every_problem(bundle: Path) -> None:
    assert run("bundle", "verify", str(bundle)).stdout == f"verified {bundle}: 2 kernels\n"
    for library in bundle.rglob("kernel.so"):
        library.write_bytes(b"")
    result = run("bundle", "verify", str(bundle), code=1)
    assert result.stderr.count("has 0 bytes instead of") == 2
    assert len(run_json("bundle", "verify", str(bundle), code=1)["problems"]) == 2
    assert "is not a bundle" in run("bundle", "verify", str(bundle / "x"), code=1).stderr


def test_inspect_shows_the_kernels(bundle: Path) -> None:
    lines = run("bundle", "inspect", str(bundle)).stdout.splitlines()
    assert lines[0].split() == ["kernel", "arch", "cuda", "platform", "size", "digest"]
    assert lines[1].split()[:4] == [
        "wkv7_n64_bf16_l16_sm90a.forward",
        "sm90a",
        "13",
        "linux-x86_64",
    ]
    assert lines[2].split()[:3] == [f"{NAME}.forward", "x86_64_v3", "-"]
    assert lines[3].startswith("2 kernels, ")
    assert lines[3].endswith("not signed")


def test_install_copies_or_unpacks_to_where_it_is_found(
    tmp_path: Path, bundle: Path, own_cache: Path
) -> None:
    from rwkv_jit.bundle import bundles_in_force, open_bundle
    from rwkv_jit.bundle.archive import write_archive

    tar = tmp_path / "other.tar"
    write_archive(open_bundle(bundle), tar)
    run("bundle", "install", str(bundle))
    run("bundle", "install", str(tar))
    roots = [opened.root for opened in bundles_in_force(current_settings())]
    assert roots == [own_cache / "bundles" / "bundle", own_cache / "bundles" / "other"]
    assert all(contents(root) == contents(bundle) for root in roots)
    assert "--force" in run("bundle", "install", str(tar), code=1).stderr
    shown = run("bundle", "install", str(tar), "--to", str(tmp_path / "there")).stdout
    assert shown.endswith(f"use it with: RWKV_JIT_BUNDLE_PATH={tmp_path / 'there'}\n")


def test_keys_sign_and_signatures_are_checked(
    tmp_path: Path, bundle: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run_json("bundle", "keygen", str(tmp_path / "key"))
    key, public = made["private"], made["public"]
    assert "not signed" in run("bundle", "verify", str(bundle), "--key", public, code=1).stderr
    run("bundle", "sign", str(bundle), key)
    checked = run_json("bundle", "verify", str(bundle), "--key", public)
    assert checked == {"path": str(bundle), "problems": [], "signed_by": public}
    other = run_json("bundle", "keygen", str(tmp_path / "other"))["public"]
    monkeypatch.setenv("RWKV_JIT_BUNDLE_KEYS", other)
    current_settings.cache_clear()
    for command in (
        ("verify", str(bundle)),
        ("install", str(bundle)),
        ("wheel", str(bundle), str(tmp_path / "wheels")),
    ):
        assert "not by the owner of" in run("bundle", *command, code=1).stderr
    assert "2 kernels" in run("bundle", "install", str(bundle), "--key", public).stdout
    signed = run_json("bundle", "build", str(tmp_path / "out"), *SMALL, "--sign", key)
    assert signed["signed"]


def test_wheel_is_written(tmp_path: Path, bundle: Path) -> None:
    made = run_json(
        "bundle", "wheel", str(bundle), str(tmp_path / "wheels"), "--name", "k", "--version", "2"
    )
    assert Path(made["wheel"]).name.startswith("k-2-py3-none-")
    assert Path(made["wheel"]).is_file()


def test_all_plans_every_head_size_and_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rwkv_jit.cli import warming

    planned: list[Any] = []

    def take(sources: list[Any], *_: object, **__: object) -> list[Any]:
        planned.extend(sources)
        return []

    monkeypatch.setattr(warming, "build_all", take)
    run("bundle", "build", str(tmp_path / "out"), "--all", "--op", "wkv7", "--arch", "8.0,12.0f")
    found = {
        (source.config.arch, source.config.head_size, source.config.dtype) for source in planned
    }
    sizes, dtypes = (16, 32, 64, 128, 256), ("bf16", "fp16", "fp32")
    assert found == {
        (arch, size, dtype) for arch in ("sm80", "sm120f") for size in sizes for dtype in dtypes
    }
    assert {source.entry for source in planned} == {"forward", "backward"}
