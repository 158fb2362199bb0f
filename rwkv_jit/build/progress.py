"""What a person sees of a build: a few lines on standard error, and nothing for a fast one."""

from __future__ import annotations

import sys

_FIRST_SECONDS = 1.0
_HEARTBEAT_SECONDS = 10.0


class Progress:
    """The lines of one build: one when it takes longer than a second, one every ten seconds, one
    when it ends, and those of a wait for another process, which the log level "warning" leaves."""

    def __init__(self, identity: str, log_level: str) -> None:
        self._identity = identity
        self._shown = log_level in ("debug", "info")
        self._waits_shown = self._shown or log_level == "warning"
        self._next = _FIRST_SECONDS

    def tick(self, seconds: float) -> None:
        """Called often while a build runs; `seconds` since it began."""
        if not self._shown or seconds < self._next:
            return
        if self._next == _FIRST_SECONDS:
            self._write(f"building {self._identity} ...")
        else:
            self._write(f"still building {self._identity} ({seconds:.0f} s)")
        self._next = _HEARTBEAT_SECONDS * (seconds // _HEARTBEAT_SECONDS + 1)

    def waiting(self, seconds: float, holder: str) -> None:
        """Called every few seconds while another process builds the same kernel."""
        if self._waits_shown:
            self._write(f"waiting {seconds:.0f} s for {holder}, which builds {self._identity}")

    def done(self, seconds: float) -> None:
        """Called when the build succeeded."""
        if self._shown and self._next != _FIRST_SECONDS:
            self._write(f"built {self._identity} in {seconds:.1f} s")

    @staticmethod
    def _write(text: str) -> None:
        # One piece, so that lines of several threads do not mix.
        sys.stderr.write(f"rwkv_jit: {text}\n")
        sys.stderr.flush()
