"""Environment variables: what they mean, and what is said of those that mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from rwkv_jit.errors import SettingsError
from rwkv_jit.settings import Settings, parse_size


def test_empty_environment_gives_the_defaults() -> None:
    assert Settings.from_environment({}) == Settings()
    assert Settings().cache_max_bytes == 2 << 30
    assert Settings().build_timeout == 900


def test_variables_are_read() -> None:
    settings = Settings.from_environment(
        {
            "RWKV_JIT_CACHE_DIR": "/somewhere",
            "RWKV_JIT_CACHE_MAX_BYTES": "500M",
            "RWKV_JIT_ALLOW_SHARED_CACHE": "1",
            "RWKV_JIT_BUILD_TIMEOUT": "60",
            "RWKV_JIT_LOCK_TIMEOUT": "2.5",
            "RWKV_JIT_DEBUG": "1",
        }
    )
    assert settings.debug
    assert settings.cache_dir == Path("/somewhere")
    assert settings.cache_max_bytes == 500 << 20
    assert settings.allow_shared_cache
    assert (settings.build_timeout, settings.lock_timeout) == (60.0, 2.5)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("RWKV_JIT_CACHE_MAX_BYTES", "much"),
        ("RWKV_JIT_CACHE_MAX_BYTES", "-1"),
        ("RWKV_JIT_ALLOW_SHARED_CACHE", "perhaps"),
        ("RWKV_JIT_BUILD_TIMEOUT", "0"),
        ("RWKV_JIT_LOCK_TIMEOUT", "soon"),
        ("RWKV_JIT_LOCK_TIMEOUT", "nan"),
    ],
)
def test_value_without_a_meaning_is_an_error_that_names_the_variable(
    variable: str, value: str
) -> None:
    with pytest.raises(SettingsError, match=f"{variable}='{value}'"):
        Settings.from_environment({variable: value})


def test_home_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    value = "~no-such-user-anywhere/cache"
    with pytest.raises(SettingsError, match=r"RWKV_JIT_CACHE_DIR.*home directory"):
        Settings.from_environment({"RWKV_JIT_CACHE_DIR": value})


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("1000", 1000), ("1k", 1024), ("2GiB", 2 << 30), ("3 MB", 3 << 20), ("x", None)],
)
def test_sizes_are_bytes_or_powers_of_1024(text: str, size: int | None) -> None:
    assert parse_size(text) == size
