"""Tasks for other processes, and what becomes of them. Standard library only."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from scconv_deploy.system.failures import Failure, failure_of

Tell = Callable[[str, str], None]
"""(name of a task, what it does now)"""
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Task:
    """Call of a function in another process.

    Attributes:
        name: unique name.
        work: a function of a module; called with the arguments and a progress callback.
        arguments: picklable values.
        memory_bytes: memory that the call is expected to take at most; 0 if unknown.
        fresh: whether it needs a process in which no other task has run, because it imports the user's code.
    """

    name: str
    work: Callable[..., Any]
    arguments: Sequence[Any] = ()
    memory_bytes: int = 0
    fresh: bool = False


@dataclass(frozen=True)
class Outcome:
    """Result of a task: its value, or why there is none.

    Attributes:
        peak_bytes: largest resident memory of the process; 0 if unknown.
    """

    name: str
    value: Any = None
    failure: Failure | None = None
    peak_bytes: int = 0


class Parcel(Protocol):
    """Bytes that were shared with all processes; picklable, and equal parcels hold the same."""

    def __hash__(self) -> int: ...

    def content(self) -> bytes: ...


class Workers(Protocol):
    """Processes of one engine.

    Attributes:
        jobs: number of tasks at a time.
        elsewhere: whether the processes may run on other machines, with other files.
        within: workers that a task can give tasks to, picklable; None if it must do its work itself.
    """

    @property
    def jobs(self) -> int: ...

    @property
    def elsewhere(self) -> bool: ...

    @property
    def within(self) -> Workers | None: ...

    def sharing(self, content: bytes) -> AbstractContextManager[Parcel]:
        """Share bytes with all processes while the block lasts; each machine gets them once."""
        ...

    def run(self, tasks: Sequence[Task], tell: Tell) -> Generator[Outcome]:
        """Yield the outcome of each task as it ends; ending the iterator early ends the processes."""
        ...


def attempt(task: Task, tell: Tell) -> Outcome:
    """Run a task in this process; every error becomes a failure."""
    try:
        value, failure = task.work(*task.arguments, lambda text: tell(task.name, str(text))), None
    except BaseException as error:
        value, failure = None, failure_of(error)
    return Outcome(task.name, value, failure, peak_bytes())


def peak_bytes() -> int:
    """Largest resident memory of this process so far; 0 where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def thread_settings(threads: int) -> dict[str, str]:
    """Environment variables that bound the threads of numeric libraries."""
    return dict.fromkeys(_THREADS, str(threads))


def bound_threads(threads: int) -> None:
    """Bound the threads of this process: libraries not yet loaded read the environment, PyTorch is told."""
    os.environ.update(thread_settings(threads))
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


@dataclass
class Admission:
    """Rule for how many tasks run at a time: no more than ``jobs``, and no more than fit into memory.

    One task always runs, however large it is.

    Attributes:
        jobs: number of tasks at a time.
        memory_bytes: memory for all tasks together; None if unknown.
        usual_bytes: memory assumed of a task that says nothing, until one has ended; then the largest peak so far.
    """

    jobs: int
    memory_bytes: int | None = None
    usual_bytes: int = 2 << 30
    _running: dict[str, int] = field(default_factory=dict)
    _measured: int = 0

    def admits(self, task: Task) -> bool:
        """Whether the task may start now."""
        if not self._running:
            return True
        if len(self._running) >= self.jobs:
            return False
        needed = sum(self._running.values()) + self._expected(task)
        return self.memory_bytes is None or needed <= self.memory_bytes

    def start(self, task: Task) -> None:
        self._running[task.name] = self._expected(task)

    def end(self, outcome: Outcome) -> None:
        del self._running[outcome.name]
        self._measured = max(self._measured, outcome.peak_bytes)

    def _expected(self, task: Task) -> int:
        return task.memory_bytes or self._measured or self.usual_bytes

    @property
    def running(self) -> Mapping[str, int]:
        """Expected memory of the running tasks, by name."""
        return self._running
