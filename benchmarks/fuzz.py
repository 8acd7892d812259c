"""Draw small models, checkpoints and graphs; hold what the command line says of them against the truth.

Each draw is a command. When it ends with exit 0, its artifact is compared with PyTorch (or with the file that it came
from) by this module's own code: a difference is a *wrong success*. When it refuses a model that is known to be healthy,
that is a *false alarm*. A traceback is an exit 1. A damaged copy of an artifact that ``verify`` passes is *missed*.

Draws of one seed are the same on every machine; a draw that fails prints its command, which runs alone.
"""

from __future__ import annotations

import argparse
import random
import shlex
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from typer.testing import CliRunner

from benchmarks import fuzz_draws
from benchmarks.fuzz_draws import Draw, Outcome
from benchmarks.harness import write
from scconv_deploy.cli import app

_COLUMNS = {
    "kind": "kind",
    "draws": "draws",
    "done, and right": "right",
    "refused, rightly": "refused",
    "refused, where either would do": "cautious",
    "wrong successes": "wrong",
    "false alarms": "alarms",
    "exit 1": "crashes",
    "damage passed": "missed",
    "seconds": "seconds",
}
_FAULTS = ("wrong", "alarms", "crashes", "missed")


@dataclass
class _Judged:
    """What became of one draw: a column of the table, and words if it is a fault."""

    column: str
    words: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--kind", choices=list(fuzz_draws.KINDS), help="this kind alone")
    parser.add_argument("--only", type=int, help="this draw alone, its output shown")


def run(options: argparse.Namespace) -> int:
    """1 if there is a fault."""
    kinds = [options.kind] if options.kind else list(fuzz_draws.KINDS)
    rows = {kind: dict.fromkeys(list(_COLUMNS.values())[1:], 0) | {"kind": kind} for kind in kinds}
    faults: list[str] = []
    for index in range(options.draws):
        if options.only is not None and index != options.only:
            continue
        kind, start = kinds[index % len(kinds)], time.perf_counter()
        judged, command = _one(kind, options.seed * 1_000_003 + index, show=options.only is not None)
        rows[kind]["draws"] += 1
        rows[kind][judged.column] += 1
        rows[kind]["seconds"] = round(rows[kind]["seconds"] + time.perf_counter() - start, 1)
        if judged.column in _FAULTS:
            faults.append(f"draw {index}, {judged.column}: {judged.words}\n    {command}")
            print(faults[-1], flush=True)
    if options.only is None:
        write(options.results, list(rows.values()), _COLUMNS, summary={"faults": faults}, seed=options.seed)
    return bool(faults)


def _one(kind: str, seed: int, show: bool) -> tuple[_Judged, str]:
    folder = Path(tempfile.mkdtemp(prefix="scconv-fuzz-"))
    try:
        draw = fuzz_draws.KINDS[kind](random.Random(seed), folder)
        outcome = _invoke(draw.arguments, folder)
        if show:
            print(outcome.text)
        return _judge(draw, outcome), shlex.join(("scconv-deploy", *draw.arguments))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _invoke(arguments: tuple[str, ...], folder: Path) -> Outcome:
    result = CliRunner().invoke(app, [*arguments])
    return Outcome(result.exit_code, result.output, folder)


def _judge(draw: Draw, outcome: Outcome) -> _Judged:
    line = (outcome.text.strip().splitlines() or [""])[-1]
    if outcome.code not in (0, 2, 3, 4, 5, 6, 7):
        return _Judged("crashes", f"exit {outcome.code}: {line}")
    if outcome.code:
        if draw.expected == "success" or outcome.code not in draw.refusals:
            return _Judged("alarms", f"exit {outcome.code}: {line}")
        return _Judged("refused" if draw.expected == "refusal" else "cautious")
    if draw.expected == "refusal":
        return _Judged("wrong", "exit 0, where nothing can be right")
    if words := draw.compare(outcome):
        return _Judged("wrong", words)
    for name, arguments in draw.damaged(outcome):
        if _invoke(arguments, outcome.folder).code != 6:
            return _Judged("missed", name)
    return _Judged("right")
