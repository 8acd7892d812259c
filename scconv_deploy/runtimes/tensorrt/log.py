"""TensorRT's log messages and build progress; the progress monitor can cancel a build."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

_ERRORS = ("ERROR", "INTERNAL_ERROR")
_ALREADY = re.compile(r"A node named \S+ already exists, the output tensors of this new instance")
Report = Callable[[float, str], None]


class LibraryLog:
    """TensorRT logger that keeps the messages.

    TensorRT keeps the first logger of a process and ignores later ones, so each module has one: :func:`library_log`.
    """

    def __init__(self, module: ModuleType) -> None:
        self._messages: list[tuple[str, str]] = []
        outer = self

        class Logger(module.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                module.ILogger.__init__(self)

            def log(self, severity: Any, message: str) -> None:
                outer._messages.append((severity.name, message))

        self.logger = Logger()

    @contextmanager
    def recording(self) -> Iterator[list[tuple[str, str]]]:
        """Record the messages of a block as (severity, message)."""
        before, self._messages = self._messages, []
        try:
            yield self._messages
        finally:
            self._messages = before


@functools.cache
def library_log(module: ModuleType) -> LibraryLog:
    """The single log of a TensorRT module in this process."""
    return LibraryLog(module)


def errors(messages: Sequence[tuple[str, str]]) -> list[str]:
    """Errors among the messages, in order, each in one line."""
    return [" ".join(message.split()) for severity, message in messages if severity in _ERRORS]


def warnings(messages: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """Warnings among the messages, each once, with a count where it was repeated.

    The warning about repeated node names in an expanded function is left out. It says nothing about the engine, and the
    parser gives it only for the first such model of a process (measured with TensorRT-RTX 1.7), so equal builds would
    have different manifests.
    """
    lines = (" ".join(message.split()) for severity, message in messages if severity == "WARNING")
    counts = Counter(line for line in lines if not _ALREADY.search(line))
    return tuple(text if count == 1 else f"{text} ({count} times)" for text, count in counts.items())


class Progress:
    """Progress of nested build phases as one fraction that never falls; can cancel the build.

    Attributes:
        fraction: 0 to 1.
        cancelled: set by :meth:`cancel`; the library stops at its next step.
        remark: note shown with every later phase.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._open: dict[str, tuple[int, int]] = {}  # phase -> (steps done, steps); outermost first
        self.fraction = 0.0
        self.cancelled = False
        self.remark = ""

    def cancel(self) -> None:
        """Ask the library to stop; later progress is discarded."""
        self.cancelled = True

    def say(self, remark: str) -> None:
        """Show a note now and with every later phase; called from another thread than the library's."""
        self.remark = remark
        self._report(self.fraction, remark)

    def start(self, phase: str, steps: int) -> None:
        self._open[phase] = (0, max(steps, 1))
        self._tell()

    def step(self, phase: str, step: int) -> bool:
        """Record a finished step, counted from 0; return False to stop the library."""
        if phase in self._open:
            self._open[phase] = (step + 1, self._open[phase][1])
            self._tell()
        return not self.cancelled

    def finish(self, phase: str) -> None:
        self._open.pop(phase, None)
        if not self._open:
            self.fraction = 1.0

    def _tell(self) -> None:
        inner = 0.0
        for done, steps in reversed(self._open.values()):
            inner = min(1.0, (done + inner) / steps)
        self.fraction = max(self.fraction, inner)
        if not self.cancelled:
            phase = next(reversed(self._open))
            self._report(self.fraction, f"{phase} ({self.remark})" if self.remark else phase)


def progress_monitor(module: ModuleType, progress: Progress) -> Any:
    """Make an ``IProgressMonitor`` of the module; keep it as long as the builder uses it. It must not raise."""

    class Monitor(module.IProgressMonitor):  # type: ignore[name-defined]
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            progress.start(phase_name, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return progress.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            progress.finish(phase_name)

    return Monitor()
