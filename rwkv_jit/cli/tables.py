"""Views of what the commands show to people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .describe import entry_data, kernel_name
from .explain import Explanation
from .output import STATUS_STYLES, make_table, shorten, show_age, show_bytes, show_number
from .toolchain_checks import Check
from .warming import Outcome


def operator_view(operator: Mapping[str, Any]) -> Group:
    """An operator: formula, choices and tensors, from `operator_data`."""
    called = next(iter(operator["entries"].values()))
    tensors = [
        ("in place" if tensor["mutated"] else "input", tensor) for tensor in called["inputs"]
    ]
    tensors += [("output", tensor) for tensor in called["outputs"] if not tensor["saved"]]
    return Group(
        Text(operator["name"], "bold") + Text(f"  {operator['summary']}"),
        Text(f"  {operator['formula']}\n"),
        Padding(_choices_table(operator), (0, 0, 1, 2)),
        Padding(_tensors_table(tensors), (0, 0, 1, 2)),
    )


def outcomes_table(outcomes: Sequence[Outcome]) -> Table:
    """What became of each kernel; seconds only where it was built now."""
    rows = []
    for outcome in outcomes:
        data = outcome_data(outcome)
        seconds = data["build_seconds"] if outcome.status == "built" else None
        numbers = (show_number(data[name]) for name in ("registers", "spill_bytes"))
        rows.append((outcome.identity, outcome.status, show_number(seconds, 1), *numbers))
    columns = ("kernel", "status", "seconds#", "registers#", "spill bytes#")
    return make_table(columns, rows, ["kernel"])


def outcome_data(outcome: Outcome) -> dict[str, Any]:
    """What became of a kernel, as plain data."""
    data = {} if outcome.entry is None else entry_data(outcome.entry)
    names = ("digest", "library", "build_seconds", "registers", "spill_bytes")
    return {
        "kernel": outcome.identity,
        "status": outcome.status,
        **{name: data.get(name) for name in names},
        "error": None if outcome.error is None else str(outcome.error),
    }


def failures_text(failures: Sequence[Outcome]) -> str:
    """Every different error once, without the compilers' command lines, which the logs hold."""
    said: dict[str, list[str]] = {}
    for failure in failures:
        message = str(failure.error).partition("\nCommand: ")[0]
        # Of one kernel alone it is, and names it, if it begins so.
        names = [] if message.startswith(failure.identity) else [failure.identity]
        said.setdefault(message, []).extend(names)
    return "\n".join(
        f"error: {', '.join(names)}: {message}" if names else f"error: {message}"
        for message, names in said.items()
    )


def checks_view(checks: Sequence[Check]) -> Group:
    """A table of checks, then what would help where something is wrong."""
    rows = [(check.name, check.status, check.value) for check in checks]
    table = make_table(("check", "status", "found"), rows, ["found"])
    fixes = [
        Text(f"\n{check.status}: ", STATUS_STYLES[check.status])
        + Text(f"{check.name}: {check.fix}")
        for check in checks
        if check.fix
    ]
    return Group(table, *fixes)


def explanation_view(explanation: Explanation) -> Group:
    """Which layer answers for a kernel, then each of them."""
    rows = [
        (layer.name, "yes" if layer.answers else "no", layer.where, layer.said)
        for layer in explanation.layers
    ]
    table = make_table(("layer", "answers", "where", "why"), rows, ["where", "why"])
    title = Text(explanation.kernel, "bold") + Text(f"  from: {explanation.answer}")
    return Group(title, Padding(table, (0, 0, 1, 2)))


def entry_view(data: Mapping[str, Any], log: str) -> Group:
    """A cache entry, from `entry_data`, with the end of its log."""
    fields = data["fields"]
    facts = {
        "digest": data["digest"],
        "built": f"{data['created'][:19]} UTC ({show_age(data['created'])} ago)",
        "took": f"{data['build_seconds']:.1f} s",
        "size": show_bytes(data["bytes"]),
        "compiler": fields.get("nvcc") or fields.get("host_compiler", "?"),
        "flags": " ".join(fields.get("flags", "").split("\n")),
        "library": data["library"],
        "source": data["source"],
        "log": data["log"],
    }
    names = ("registers", "spill_stores", "spill_loads", "shared", "stack")
    resources = [
        (kernel_name(kernel), *(str(used.get(name, "-")) for name in names))
        for kernel, used in data["resources"].items()
    ]
    columns = ("function", "registers#", "spill stores#", "spill loads#", "shared#", "stack#")
    parts: list[Table | Text] = [
        Text(data["kernel"], "bold"),
        _facts_table(facts),
        Text(),
        make_table(columns, resources, columns[:1]) if resources else Text("no registers reported"),
        Text("\nend of the log:", "bold"),
        Text(log.rstrip("\n"), no_wrap=True, overflow="ellipsis"),
    ]
    return Group(*parts)


def entries_table(entries: Sequence[Mapping[str, Any]]) -> Table:
    """Cache entries, from `entry_data`."""
    rows = [
        (
            data["kernel"],
            show_bytes(data["bytes"]),
            show_age(data["created"]),
            show_number(data["registers"]),
            show_number(data["spill_bytes"]),
            data["digest"][:8],
        )
        for data in entries
    ]
    return make_table(("kernel", "size#", "age#", "regs#", "spills#", "digest"), rows, ["kernel"])


def bundled_table(kernels: Sequence[Mapping[str, Any]]) -> Table:
    """The kernels of a bundle, from `bundled_data`."""
    rows = [
        (
            data["kernel"],
            data["arch"],
            str(data["cuda_major"] or "-"),
            data["platform"],
            show_bytes(data["bytes"]),
            data["digest"][:8],
        )
        for data in kernels
    ]
    columns = ("kernel", "arch", "cuda#", "platform", "size#", "digest")
    return make_table(columns, rows, ["kernel"])


def _choices_table(operator: Mapping[str, Any]) -> Table:
    """What can be chosen, a column for each platform."""
    platforms = operator["platforms"]
    columns = ["", *(_platform_name(row) for row in platforms)]
    names = {"head_sizes": "head size", "dtypes": "dtype", "chunk_lengths": "chunk length"}
    rows = [
        [shown, *(shorten([str(value) for value in row[name]]) for row in platforms)]
        for name, shown in names.items()
    ]
    rows.append(["state dtype", *(_show_states(row["state_dtypes"]) for row in platforms)])
    for name, shown in (
        ("decays", "decay"),
        ("state_layouts", "state layout"),
        ("precisions", "precision"),
    ):
        rows.append([shown, *([", ".join(operator[name])] * len(platforms))])
    # Not every operator can be chosen everything of.
    rows = [row for row in rows if any(row[1:])]
    return make_table(columns, rows, columns[1:])


def _facts_table(facts: Mapping[str, str]) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(Text(name, "dim"), Text(value))
    return table


def _tensors_table(tensors: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    rows = [
        (
            tensor["name"],
            role,
            f"[{', '.join(tensor['shape'])}]",
            " or ".join(_show_dtype(rule) for rule in tensor["dtype"]),
            f"{tensor['meaning']} (optional)" if tensor["optional"] else tensor["meaning"],
        )
        for role, tensor in tensors
    ]
    return make_table(("tensor", "role", "shape", "dtype", "meaning"), rows, ["meaning"])


def _platform_name(row: Mapping[str, Any]) -> str:
    return f"CUDA {row['arch']}" if row["platform"] == "cuda" else "CPU"


def _show_states(by_dtype: Mapping[str, Sequence[str]]) -> str:
    groups: dict[str, list[str]] = {}
    for dtype, states in by_dtype.items():
        groups.setdefault(", ".join(states), []).append(dtype)
    if len(groups) <= 1:
        return next(iter(groups), "")
    return "; ".join(f"{states} (for {', '.join(dtypes)})" for states, dtypes in groups.items())


def _show_dtype(rule: str) -> str:
    if rule.startswith("like:"):
        return f"as {rule.removeprefix('like:')}"
    names = {
        "op": "dtype",
        "state": "state dtype",
        "accumulator": "fp32 (fp64 for fp64)",
        "checkpoint": "checkpoint dtype",
    }
    return names.get(rule, rule)
