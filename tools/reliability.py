"""Inject every fault that the cache claims to survive, and write down what came of it:
python3 tools/reliability.py writes docs/reliability.md from the tests that did it."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from environment import ROOT, prepare_or_exit

PAGE = ROOT / "docs" / "reliability.md"
MARK = "<!-- Below: written by tools/reliability.py -->\n"
SECTIONS = {
    "test_races": "Races",
    "test_kills": "Kills",
    "test_corruption": "Corruption",
    "test_permissions": "Permission",
    "test_space": "Space",
    "test_growth": "Growth",
    "test_binaries": "Binaries",
}


@dataclass(slots=True)
class Fault:
    """injected: how many times. lost: tests of it that failed. recovery: of the slowest, in
    seconds; None where there is nothing to wait for."""

    injected: int = 0
    lost: int = 0
    recovery: float | None = None


def main() -> int:
    """Run the tests of reliability and write the page; their exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="tests at once")
    jobs = parser.parse_args().jobs
    python = prepare_or_exit(["test"])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        status = subprocess.run(
            [
                *(str(python), "-m", "pytest", "-q", "-n", str(jobs)),
                *("-o", "junit_family=xunit1", f"--junitxml={report}", "tests/reliability"),
            ],
            cwd=ROOT,
            check=False,
        ).returncode
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    seconds = time.monotonic() - began
    text = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    PAGE.write_text(text + MARK + render(cases, seconds), encoding="utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {len(cases)} tests in {seconds:.0f} s", file=sys.stderr)
    return status


def render(cases: Iterable[ElementTree.Element], seconds: float) -> str:
    """The tables, from the test cases of a JUnit report."""
    cases = list(cases)
    sections: dict[str, dict[str, Fault]] = {name: {} for name in SECTIONS.values()}
    skipped, failed = [], []
    for case in cases:
        module = case.get("classname", "").split(".")[-1]
        broken = case.find("failure") is not None or case.find("error") is not None
        if broken:
            failed.append(case.get("name", ""))
        if case.find("skipped") is not None:
            skipped.append(case.get("name", ""))
        for entry in case.iter("property"):
            if entry.get("name") != "fault":
                continue
            data = json.loads(entry.get("value", "{}"))
            fault = sections[SECTIONS[module]].setdefault(data["fault"], Fault())
            fault.injected += data["injected"]
            fault.lost += broken
            times = [t for t in (fault.recovery, data["recovery"]) if t is not None]
            fault.recovery = max(times, default=None)
    counts = f"{len(failed)} failed, {len(skipped)} skipped ({os.cpu_count()} cores)"
    lines = ["", f"{len(cases)} tests in {seconds:.0f} s, {counts}.", ""]
    lines += [f"- failed: {name}" for name in failed] + [f"- skipped: {name}" for name in skipped]
    lines += [""] if failed or skipped else []
    for section, faults in sections.items():
        if faults:
            lines += [f"## {section}", "", "| fault | injected | lost | recovery, s |"]
            lines += ["|---|---|---|---|"]
            lines += [
                f"| {name} | {fault.injected} | {fault.lost or 'nothing'} | "
                f"{'' if fault.recovery is None else f'{max(0.0, fault.recovery):.2f}'} |"
                for name, fault in sorted(faults.items())
            ]
            lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
