"""Progress where stderr is no terminal: a line every ten seconds, for the logs of CI. Standard library only."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

EVERY_S = 10.0
"""Seconds between two lines; work that is done sooner prints none."""
SAME_S = 60.0
"""Seconds after which an unchanged message is printed again: CI ends silent jobs."""


class Notice(str):
    """A progress message that stays on the terminal and is printed with ``--json`` too."""


class LogLines:
    """Writer of the latest progress message and the time that has passed, while its block lasts."""

    def __init__(self, write: Callable[[str], object] | None = None, clock: Callable[[], float] = time.monotonic):
        self._write = write or _to_stderr
        self._clock = clock
        self._start = clock()
        self._message = self._told = ""
        self._told_s = self._start
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="progress lines", daemon=True)

    def __enter__(self) -> LogLines:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._done.set()
        self._thread.join(timeout=1)

    def __call__(self, message: str) -> None:
        self._message = message

    def look(self) -> None:
        """Write the latest message if it is time for it."""
        now, message = self._clock(), self._message
        waited = now - self._told_s
        if not message or waited < (SAME_S if message == self._told else EVERY_S):
            return
        self._told, self._told_s = message, now
        seconds = int(now - self._start)
        self._write(f"[{seconds // 60}:{seconds % 60:02d}] {message}\n")

    def _watch(self) -> None:
        while not self._done.wait(EVERY_S / 10):
            self.look()


def _to_stderr(line: str) -> None:
    with suppress(OSError, ValueError):  # nobody reads it, or it is closed: no reason to end the work
        sys.stderr.write(line)
        sys.stderr.flush()
