"""Rendering: a configuration becomes one self-contained source. The only user of jinja2."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jinja2

from .arch import is_cuda
from .config import DECAYS, OpConfig
from .errors import RwkvJitError
from .spec import LAUNCHER_ABI, EntrySpec, KernelVariant, OpSpec

_INCLUDE = re.compile(r'^[ \t]*#include "(rwkv_jit/[a-z0-9_./]+)"[^\n]*\n', re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderedSource:
    """One translation unit, complete but for system headers.

    identity: what the built library must say it is: slug, entry and template.
    text: the source.
    suffix: ".cu" or ".cpp".
    """

    config: OpConfig
    entry: str
    identity: str
    text: str
    suffix: str


@dataclass(frozen=True, slots=True)
class BlockField:
    """One member of the launcher's argument block: "pointer", "int64", "int32" or "double"."""

    name: str
    kind: str


def argument_block(entry: EntrySpec, variant: KernelVariant) -> tuple[BlockField, ...]:
    """The members of the struct that a launcher takes: tensors, dtype codes, sizes, scalars, stream
    and thread count. An optional tensor that is absent is a null pointer."""
    tensors = (*entry.inputs, *entry.outputs, *variant.scratch)
    return (
        *(BlockField(tensor.name, "pointer") for tensor in tensors),
        *(
            BlockField(f"{tensor.name}_dtype", "int32")
            for tensor in tensors
            if tensor.has_dtype_field
        ),
        *(BlockField(size, "int64") for size in entry.sizes),
        *(BlockField(scalar, "double") for scalar in entry.scalars),
        BlockField("stream", "pointer"),
        BlockField("threads", "int64"),
    )


def render(spec: OpSpec, config: OpConfig, entry: str) -> RenderedSource:
    """The source of one entry of one configuration. Raises ConfigError if no kernel serves it."""
    spec.check(config)
    variant = spec.variant(config, entry)
    identity = f"{config.slug}.{entry}"
    text = (
        _environment()
        .get_template(variant.template)
        .render(template_variables(spec, config, entry, identity))
    )
    return RenderedSource(
        config=config,
        entry=entry,
        identity=identity,
        text=_inline_includes(text),
        suffix=".cu" if is_cuda(config.arch) else ".cpp",
    )


def template_variables(
    spec: OpSpec, config: OpConfig, entry: str, identity: str
) -> Mapping[str, int | str]:
    """Everything that the template of this entry may use: ints and strings, nothing else."""
    variant = spec.variant(config, entry)
    types = {"pointer": "void*", "int64": "int64_t", "int32": "int32_t", "double": "double"}
    block = argument_block(spec.entries[entry], variant)
    knobs: Mapping[str, Mapping[str, int | str]] = {
        "chunk_length": {"chunk_length": config.chunk_length},
        "state_dtype": {"state_dtype": config.state_dtype},
        "decay": {"decay": DECAYS.index(config.decay)},
        "state_layout": {"state_is_kv": int(config.state_layout == "kv")},
    }
    return {
        "identity": identity,
        "abi": LAUNCHER_ABI,
        "arguments": " ".join(f"{types[field.kind]} {field.name};" for field in block),
        "head_size": config.head_size,
        "dtype": config.dtype,
        **{k: v for knob, values in knobs.items() if knob in spec.knobs for k, v in values.items()},
        **variant.constants(config),
    }


def template_dir() -> Path:
    """The folder of templates: inside the installed package, or beside it in a checkout."""
    packaged = Path(__file__).parent / "templates"
    if packaged.is_dir():
        return packaged
    root = Path(__file__).parent.parent
    if (root / "pyproject.toml").is_file() and (root / "templates").is_dir():
        return root / "templates"
    raise RwkvJitError(
        f"the kernel templates are missing: neither {packaged} nor {root / 'templates'} "
        "(beside a pyproject.toml) exists; reinstall rwkv_jit"
    )


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_dir()),
        undefined=jinja2.StrictUndefined,
        line_statement_prefix="//%",
        keep_trailing_newline=True,
        autoescape=False,
    )


def _inline_includes(text: str) -> str:
    """Replace each include of the project's own headers by its text, the first time it is met."""
    seen: set[str] = set()

    def expand(match: re.Match[str]) -> str:
        name = match[1]
        if name in seen:
            return ""
        seen.add(name)
        header = (template_dir() / "include" / name).read_text(encoding="utf-8")
        return f"// {name}\n" + _INCLUDE.sub(expand, header).replace("#pragma once\n", "")

    return _INCLUDE.sub(expand, text)
