"""What the package never does: evaluate data, start a shell, take a user's text into a source."""

from __future__ import annotations

import ast
import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_jit.config import OpConfig
from rwkv_jit.errors import ConfigError

PACKAGE = Path(__file__).parent.parent / "rwkv_jit"
MODULES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_IMPORTS = {"dill", "marshal", "pickle", "shelve", "socketserver", "urllib", "requests"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "torch.load", "subprocess.getoutput"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_nothing_is_evaluated_and_no_shell_is_started(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
            assert (module or "").partition(".")[0] not in FORBIDDEN_IMPORTS
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in FORBIDDEN_CALLS
            assert "shell" not in {keyword.arg for keyword in node.keywords}


@given(
    field=st.sampled_from(["dtype", "arch", "decay", "state_dtype", "state_layout"]),
    text=st.text(string.printable, max_size=20),
)
def test_no_text_of_a_users_passes_a_configuration(field: str, text: str) -> None:
    """What does pass names one of a few choices, and makes a slug that is an identifier."""
    values = {"op": "wkv7", "head_size": 64, "dtype": "bf16", "chunk_length": 16, "arch": "sm80"}
    try:
        config = OpConfig(**{**values, field: text})  # type: ignore[arg-type]
    except ConfigError:
        return
    assert config.slug.isidentifier()
    assert config.slug.isascii()


@pytest.mark.parametrize(
    "slug",
    [
        "wkv7_n64_bf16_l16_sm80; rm -rf /",
        "wkv7_n64_bf16_l16_sm80\n",
        "../wkv7_n64_bf16_l16_sm80",
        'wkv7"_n64_bf16_l16_sm80',
        "wkv7_n64_bf16_l16_sm80/../x",
        "wkv7_n\u0666\u0664_bf16_l16_sm80",
    ],
)
def test_a_slug_that_is_more_than_one_is_refused(slug: str) -> None:
    with pytest.raises(ConfigError):
        OpConfig.parse(slug)
