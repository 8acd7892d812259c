"""Stage records of a command: seconds, changes applied, candidates skipped with the reason."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from scconv_deploy.records.sensitivity import BudgetSearch


@dataclass(frozen=True)
class StageRecord:
    """Record of one stage.

    Attributes:
        name: name of the stage.
        seconds: wall clock.
        applied: changes made, one line each.
        skipped: (candidate, reason) of everything left unchanged.
        search: plans that were measured against a budget; None if the stage searched none.
    """

    name: str
    seconds: float
    applied: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    search: BudgetSearch | None = None


@dataclass
class StageLog:
    """Stage records of one run, in order."""

    records: list[StageRecord] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[OpenStage]:
        """Time a stage; record what is appended to the yielded object."""
        opened = OpenStage()
        start = time.perf_counter()
        try:
            yield opened
        finally:
            self.records.append(
                StageRecord(
                    name, time.perf_counter() - start, tuple(opened.applied), tuple(opened.skipped), opened.search
                )
            )


@dataclass
class OpenStage:
    """Changes and skips of a stage that is still running."""

    applied: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    search: BudgetSearch | None = None


def weights_lines(records: Iterable[StageRecord]) -> tuple[str, ...]:
    """Lines on the origin of a model's parameters: files loaded, number of random ones."""
    loaded = [line for record in records if record.name == "load" for line in record.applied]
    return tuple(line for line in loaded if line.startswith("weights"))


Progress = Callable[[str], None]


def silent(message: str) -> None:
    """Progress callback that does nothing; the default."""
