"""A limit in seconds of a whole run, and child processes that it can end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parent.parent


class Budget:
    """Seconds of a run, counted from here."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self._start = seconds, time.monotonic()

    def left(self, share: float = 1.0) -> float:
        """Seconds until that share of the budget is used up; 0 afterwards."""
        return max(0.0, self._start + self.seconds * share - time.monotonic())


def start(command: Sequence[str], environment: Mapping[str, str], **streams: int) -> subprocess.Popen[str]:
    """A child process in a session of its own, which :func:`end` ends whole."""
    return subprocess.Popen(command, text=True, errors="replace", cwd=ROOT, start_new_session=True,
                            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment, **streams)  # fmt: skip


def end(process: subprocess.Popen[str]) -> None:
    """Kill a child process and its own children: profilers and pytest start some, which would keep the GPU."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run(
    command: Sequence[str],
    timeout_s: float,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], object] | None = None,
) -> tuple[int | None, list[str]]:
    """Run a child process for that time at most.

    Args:
        on_line: called with each line of stdout and stderr as it comes; None to show it on stderr.

    Returns:
        The exit status, None where the time was up; and the lines that are not empty, without line feeds.

    Raises:
        OSError: it cannot be started.
    """
    process = start(command, environment or {}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    late = threading.Event()

    def kill() -> None:
        if process.poll() is None:
            late.set()
        end(process)

    timer = threading.Timer(timeout_s, kill)
    timer.start()
    lines: list[str] = []
    try:
        for line in process.stdout or ():
            if line.strip():
                lines.append(line.rstrip())
            (on_line or sys.stderr.write)(line)
        process.wait()
    finally:
        timer.cancel()
        end(process)
    return None if late.is_set() else process.returncode, lines
