"""A C++ compiler that begins to compile and never ends."""

from __future__ import annotations

from pathlib import Path


class StuckCompiler:
    """`program` below `folder` answers what it is asked as g++ does, and gets stuck compiling."""

    def __init__(self, folder: Path) -> None:
        self.program = folder / "stuck-g++"
        self._pid = folder / "stuck.pid"
        self.program.write_text(
            f'#!/bin/sh\ncase "$*" in *" -c "*) echo $$ > {self._pid}.new; '
            f'mv {self._pid}.new {self._pid}; exec sleep 300;; esac\nexec g++ "$@"\n'
        )
        self.program.chmod(0o755)

    def is_compiling(self) -> bool:
        """Whether it has been asked to compile."""
        return self._pid.exists()

    def is_gone(self) -> bool:
        """Whether the process that compiled has ended."""
        state = Path(f"/proc/{self._pid.read_text().strip()}/stat")
        try:
            return ") Z " in state.read_text()
        except (FileNotFoundError, ProcessLookupError):
            return True
