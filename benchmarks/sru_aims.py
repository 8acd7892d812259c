"""What the fused SRU is to reach on a GPU, and whether rows of ``sru_cuda`` say that it does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.harness import Row

HEADLINE = ("64x256x56x56", "fp16")
AUTO = "fused, auto"
COPY_SHARE, OF_COMPILE, OF_EAGER = 0.85, 2.0, 15.0


@dataclass(frozen=True)
class Verdict:
    """One aim; found is the number that decides, and where it was measured."""

    aim: str
    verdict: Literal["passed", "failed", "not run"]
    found: str


def judge(rows: Sequence[Row], l2_bytes: int) -> list[Verdict]:
    """The issue's aims in its order; what was not measured is not run, never passed."""
    fused = [row for row in rows if row["variant"] == AUTO]
    return [
        _correct([row for row in rows if str(row["variant"]).startswith("fused")]),
        _least(
            f"at least {COPY_SHARE:.0%} of the copy's bandwidth on chip, beyond the L2",
            [row for row in fused if row.get("algorithm") == "on_chip" and row["bytes"] > l2_bytes],
            "of_copy",
            COPY_SHARE,
        ),
        *_headline([row for row in fused if (row["shape"], row["type"]) == HEADLINE]),
        _least(
            "batch 1 no slower than torch.compile",
            [row for row in fused if str(row["shape"]).startswith("1x")],
            "speedup_compile",
            1.0,
        ),
    ]


def _correct(rows: Sequence[Row]) -> Verdict:
    aim = "no gate of PyTorch's changed that rounding does not explain"
    judged = [row for row in rows if row.get("unexplained") is not None]
    wrong = [row for row in judged if row["unexplained"] or not row["relative_l2"] <= row["tolerance"]]
    broken = [row for row in rows if row.get("error")]
    if broken:
        return Verdict(aim, "failed", f"{_place(broken[0])}: {broken[0]['error']}")
    if wrong:
        row = wrong[0]
        found = f"{row['unexplained']} gates, relative L2 {row['relative_l2']:.1e} in {_place(row)}; {len(wrong)} wrong"
        return Verdict(aim, "failed", found)
    return Verdict(aim, "passed" if judged else "not run", f"{len(judged)} measured variants compared")


def _headline(rows: Sequence[Row]) -> Iterator[Verdict]:
    for aim, key, limit in (("torch.compile", "speedup_compile", OF_COMPILE), ("eager", "speedup_eager", OF_EAGER)):
        yield _least(f"at least {limit:g}x {aim} at {' '.join(HEADLINE)}", rows, key, limit)


def _least(aim: str, rows: Sequence[Row], key: str, limit: float) -> Verdict:
    measured = [row for row in rows if row.get(key) is not None]
    if not measured:
        return Verdict(aim, "not run", "nothing to compare was measured")
    worst = min(measured, key=lambda row: row[key])
    missing = f", {len(rows) - len(measured)} not compared" if len(measured) < len(rows) else ""
    below = sum(row[key] < limit for row in measured)
    found = f"{worst[key]:.2f} at least, {_place(worst)}; {below} of {len(measured)} below{missing}"
    if below:
        return Verdict(aim, "failed", found)
    return Verdict(aim, "not run" if missing else "passed", found)


def _place(row: Row) -> str:
    return f"{row['shape']} {row['type']} ({row['variant']})"
