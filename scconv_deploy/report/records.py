"""What the stages leave behind: frozen records that end in ``report.json``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageRecord:
    """One stage of the pipeline.

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
    """Collects the records of one run, in order."""

    records: list[StageRecord] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[_OpenStage]:
        """Time a stage; what is noted on the yielded object goes into its record."""
        opened = _OpenStage()
        start = time.perf_counter()
        yield opened
        self.records.append(
            StageRecord(name, time.perf_counter() - start, tuple(opened.applied), tuple(opened.skipped))
        )


@dataclass
class _OpenStage:
    applied: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
