"""What every benchmark shares: interleaved timing, statistics, metadata, and how results are written.

On a shared machine the load changes while a benchmark runs. So variants take turns, in a new order each round, and
ratios are taken within one run: a slow minute then hits all of them. How much of the machine others used is recorded.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import metadata, other_cores

RESULTS = Path(__file__).parent / "results"
_SETTLE_S = 0.02
"""Between two runs: the thread pools of ONNX Runtime and OpenMP spin for a while after their last work."""
_QUIET_CORES, _PATIENCE = 0.2, 4

Row = dict[str, Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of every variant by round.

    Attributes:
        other_cores: how many cores other processes kept busy meanwhile, on average (None where it is not known).
        disturbed: how many rounds were left out because of other processes.
    """

    seconds: Mapping[str, Sequence[float]]
    other_cores: float | None = None
    disturbed: int = 0

    def row(self, variant: str, baseline: str) -> Row:
        """Statistics of one variant; speedup is baseline over variant, its quartiles those of the rounds' ratios."""
        low, median, high = _quartiles(self.seconds[variant])
        pairs = zip(self.seconds[baseline], self.seconds[variant], strict=True)
        ratio_low, _, ratio_high = _quartiles([theirs / ours for theirs, ours in pairs])
        return {
            "variant": variant,
            "median_s": median,
            "min_s": min(self.seconds[variant]),
            "p25_s": low,
            "p75_s": high,
            "rounds": len(self.seconds[variant]),
            "baseline": baseline,
            "speedup": statistics.median(self.seconds[baseline]) / median,
            "speedup_p25": ratio_low,
            "speedup_p75": ratio_high,
            "other_cores": self.other_cores,
            "rounds_disturbed": self.disturbed,
        }


def interleave(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int,
    clock: Callable[[], float] = time.perf_counter,
    patience: int = _PATIENCE,
) -> Timing:
    """Run every variant once a round, in a seeded random order; warm-up rounds are not counted.

    A round that other processes disturbed is left out and run again, at most until ``patience`` times as many have
    run; then the least disturbed ones count. What decides is the others' use of the machine, never the time measured.

    Args:
        clock: ``time.thread_time`` for variants of one thread on a machine that others load: it stops while they run.
        patience: 1 with a clock of the processor's time, which other load moves little.
    """
    for _ in range(warmup):
        for run in variants.values():
            run()
    order, shuffle = list(variants), random.Random(0).shuffle
    done: list[tuple[dict[str, float], float | None]] = []
    while sum((others or 0.0) <= _QUIET_CORES for _, others in done) < rounds and len(done) < rounds * patience:
        shuffle(order)
        done.append(other_cores(lambda: {name: _seconds(variants[name], clock) for name in order}))
    chosen = sorted(done, key=lambda one: one[1] or 0.0)[:rounds]
    others = [cores for _, cores in chosen if cores is not None]
    return Timing(
        {name: [seconds[name] for seconds, _ in chosen] for name in variants},
        round(statistics.mean(others), 2) if others else None,
        len(done) - rounds,
    )


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    time.sleep(_SETTLE_S)
    start = clock()
    run()
    return clock() - start


def write(
    results: str,
    rows: Sequence[Row],
    columns: Mapping[str, str],
    *,
    table: bool = True,
    summary: Mapping[str, Any] | None = None,
    **facts: Any,
) -> None:
    """Write ``results/<results>.json``, one row a line, and print a Markdown table.

    Args:
        columns: heading -> key of a row; keys that end in ``_s`` are seconds.
        table: False for a run that goes on: the file alone.
        summary: what the rows say together, in the file beside them.
        facts: further metadata, for example shape and seed.
    """
    shared = metadata() | facts
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{results}.json"
    document = {"benchmark": results, **(summary or {}), "metadata": shared, "rows": list(rows)}
    path.write_text(by_lines(document), encoding="utf-8")
    if table:
        show(rows, columns)
        print(f"\n{json.dumps(shared)}\nwritten to benchmarks/results/{path.name}")


def show(rows: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Print a Markdown table; columns: heading -> key of a row."""
    lines = [[_cell(key, row.get(key)) for key in columns.values()] for row in rows]
    for cells in (list(columns), ["---"] * len(columns), *lines):
        print(f"| {' | '.join(cells)} |")


def by_lines(document: Mapping[str, Any]) -> str:
    """JSON with one key, and one entry of a list, a line: what changed between two runs can be read in a diff."""
    lines = []
    for key, value in document.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in value) + "\n ]"
        lines.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and key.endswith("_s"):
        return f"{value * 1e3:.1f} ms" if value < 1 else f"{value:.2f} s"
    if isinstance(value, float):
        return f"{value:.2f}" if key.startswith(("speedup", "other")) else f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
