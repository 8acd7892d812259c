"""What the fused SRU is to reach on a GPU, and whether rows and steps of ``sru_cuda`` say that it does."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.harness import Row

HEADLINE = ("64x256x56x56", "64x512x28x28")
AUTO = "fused, auto"
COPY_SHARE, OF_COMPILE, OF_EAGER = 0.85, 2.0, 12.0
CLEAN = ("memcheck", "racecheck")
Outcome = Literal["passed", "failed", "not run"]


@dataclass(frozen=True)
class Step:
    """Something that ran beside the timing, and how it ended."""

    name: str
    verdict: Outcome
    found: str


@dataclass(frozen=True)
class Verdict:
    """One aim; found is the number that decides, and where it was measured."""

    aim: str
    verdict: Outcome
    found: str


def judge(rows: Sequence[Row], steps: Sequence[Step], sizes: Iterable[str], types: Sequence[str]) -> list[Verdict]:
    """Every aim in the same order; what was not measured is not run, never passed.

    Args:
        sizes: of batch 1, each of which must be measured in every type. Speed is judged in NCHW, gates in all layouts.
    """
    fused = {(row["shape"], row["type"]): row for row in rows if row["variant"] == AUTO and row["layout"] == "NCHW"}
    headline = [(size, name) for size in HEADLINE for name in types]
    single = [(size, name) for size in sizes for name in types]
    there = f"at {' and '.join(HEADLINE)}"
    return [
        _correct([row for row in rows if str(row["variant"]).startswith("fused")]),
        _least(f"at least {COPY_SHARE:.0%} of the copy's bandwidth {there}", fused, headline, "of_copy", COPY_SHARE),
        _least(f"at least {OF_COMPILE:g}x torch.compile {there}", fused, headline, "speedup_compile", OF_COMPILE),
        _least(f"at least {OF_EAGER:g}x eager {there}", fused, headline, "speedup_eager", OF_EAGER),
        _least("batch 1 no slower than torch.compile", fused, single, "speedup_compile", 1.0),
        _clean([step for step in steps if step.name in CLEAN]),
    ]


def _correct(rows: Sequence[Row]) -> Verdict:
    aim = "no gate of PyTorch's changed that rounding does not explain"
    broken = [row for row in rows if row.get("error")]
    if broken:
        return Verdict(aim, "failed", f"{_place(broken[0])}: {broken[0]['error']}")
    wrong = [row for row in rows if not _right(row)]
    if wrong:
        row = wrong[0]
        found = f"{row['unexplained']} gates, relative L2 {row['relative_l2']} in {_place(row)}; {len(wrong)} wrong"
        return Verdict(aim, "failed", found)
    return Verdict(aim, "passed" if rows else "not run", f"{len(rows)} measured variants compared")


def _right(row: Row) -> bool:
    distance = row["relative_l2"]
    return row["unexplained"] == 0 and distance is not None and distance <= row["tolerance"]


def _least(
    aim: str, fused: dict[tuple[str, str], Row], places: Sequence[tuple[str, str]], key: str, limit: float
) -> Verdict:
    measured = [fused[place] for place in places if fused.get(place, {}).get(key) is not None]
    if not measured:
        return Verdict(aim, "not run", "nothing to compare was measured")
    worst = min(measured, key=lambda row: row[key])
    below = sum(row[key] < limit for row in measured)
    missing = len(places) - len(measured)
    found = f"{worst[key]:.2f} at least, {_place(worst)}; {below} of {len(measured)} below"
    if missing:
        found += f", {missing} not compared"
    return Verdict(aim, "failed" if below else "not run" if missing else "passed", found)


def _clean(steps: Sequence[Step]) -> Verdict:
    aim = f"{' and '.join(CLEAN)} find nothing"
    for outcome in ("failed", "not run"):
        for step in steps:
            if step.verdict == outcome:
                return Verdict(aim, outcome, f"{step.name}: {step.found}")
    missing = [name for name in CLEAN if name not in {step.name for step in steps}]
    if missing:
        return Verdict(aim, "not run", f"{' and '.join(missing)} did not run")
    return Verdict(aim, "passed", "; ".join(f"{step.name}: {step.found}" for step in steps))


def _place(row: Row) -> str:
    return f"{row['shape']} {row['type']} {row['layout']} ({row['variant']})"
