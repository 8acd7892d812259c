"""How far a verification is, and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from scconv_deploy.verification.samples import Sample, counted


def with_progress(sources: Sequence[Iterable[Sample]], progress: Callable[[str], None]) -> Iterator[Sample]:
    """The samples of all sources in order; progress is told the name, the number and the time left of each."""
    known = [counted(source) for source in sources]
    total = sum(count or 0 for _, count in known) if all(count is not None for _, count in known) else None
    start, done = time.monotonic(), 0
    for samples, _ in known:
        for sample in samples:
            progress(f"verifying on {sample}{_where(done, total, time.monotonic() - start)}")
            yield sample
            done += 1


def _where(done: int, total: int | None, seconds: float) -> str:
    """``(3 of 20, 10%, 0:51 left)``; the first sample tells nothing yet, and a loader's length is not known."""
    if total is None:
        return f" ({done + 1})"
    if not done:
        return f" (1 of {total})"
    left = round(seconds / done * (total - done))
    return f" ({done + 1} of {total}, {done / total:.0%}, {left // 60}:{left % 60:02d} left)"
