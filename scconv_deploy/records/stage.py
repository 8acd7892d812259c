"""Records of a command's stages: seconds, changes applied, and what was skipped with the reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageRecord:
    """Record of one stage: seconds, what it applied, what it skipped and why.

    Attributes:
        name: of the stage.
        seconds: wall clock.
        applied: what it did, one line each.
        skipped: (candidate, reason) of everything that it left alone.
    """

    name: str
    seconds: float
    applied: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass
class StageLog:
    """The stage records of one run, in order."""

    records: list[StageRecord] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[OpenStage]:
        """Time a stage and record what is noted on the yielded object."""
        opened = OpenStage()
        start = time.perf_counter()
        try:
            yield opened
        finally:
            self.records.append(
                StageRecord(name, time.perf_counter() - start, tuple(opened.applied), tuple(opened.skipped))
            )


@dataclass
class OpenStage:
    """Notes of a running stage."""

    applied: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def weights_lines(records: Iterable[StageRecord]) -> tuple[str, ...]:
    """Lines on where a model's parameters come from: what was loaded, how many are random."""
    loaded = [line for record in records if record.name == "load" for line in record.applied]
    return tuple(line for line in loaded if line.startswith("weights"))


Progress = Callable[[str], None]


def silent(message: str) -> None:
    """The default progress: none."""
