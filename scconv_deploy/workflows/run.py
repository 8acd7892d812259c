"""``scconv-deploy run``: every model of a run file in every variant, each cell a bundle, and one overview of all.

A cell is made in another process, in a folder of its own beside the results, and moved to its place when it is whole. A
cell whose inputs did not change is not made again. ``run.json`` is written after every cell.
"""

from __future__ import annotations

import tarfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scconv_deploy.bundle.contents import DEVICE, MANIFEST, MODEL, REJECTED, REPORT
from scconv_deploy.bundle.folder import check_output_folder, locked_folder, place_folder, scratch_folder
from scconv_deploy.bundle.manifest import check_bundle
from scconv_deploy.errors import IntegrityError, ScconvDeployError, UsageError
from scconv_deploy.records.codec import encode
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.run import SCHEMA_VERSION, CellFacts, CellRecord, CellStatus, RunRecord
from scconv_deploy.records.stage import Progress, silent
from scconv_deploy.report.load import load_report
from scconv_deploy.report.merge import merge_files
from scconv_deploy.report.runs.load import RUN, load_run
from scconv_deploy.report.runs.render import OVERVIEW, overview_files
from scconv_deploy.report.verdict import parity_error
from scconv_deploy.system.atomic import check_output_file, write_file
from scconv_deploy.system.failures import failure_of
from scconv_deploy.system.inputs import digest_of, package_digest
from scconv_deploy.system.progress_lines import Notice
from scconv_deploy.workers.tasks import Outcome, Task, Workers
from scconv_deploy.workflows.cell import Cell, Made, Make, luggage_for, make_cell, make_there, unpack
from scconv_deploy.workflows.run_latency import kept_latency, timed

PRELOAD = ("scconv_deploy.workflows.deploy", "scconv_deploy.commands.models")
"""Modules that every cell needs."""


@dataclass(frozen=True)
class Planned:
    """A cell and what a run would do with it; ``kept`` is the record of an unchanged one."""

    cell: Cell
    kept: CellRecord | None
    memory_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Cells of a run file and their state in the output folder; ``scconv-deploy run --dry-run``."""

    output: Path
    planned: tuple[Planned, ...]

    def as_json(self) -> dict[str, Any]:
        return {
            "output": str(self.output),
            "cells": [
                {"name": one.cell.name, "command": one.cell.command(self.output), "unchanged": one.kept is not None}
                for one in self.planned
            ],
        }


@dataclass(frozen=True)
class RunResult:
    """A run that ended: its folder and the records of all cells; true if every cell passed."""

    output: Path
    record: RunRecord

    def __bool__(self) -> bool:
        return self.record.exit_code == 0

    def as_json(self) -> dict[str, Any]:
        return {"output": str(self.output), "exit_code": self.record.exit_code, **encode(self.record)}


class CellsFailedError(ScconvDeployError):
    """Cells of a run failed; its exit code is the worst one's."""

    def __init__(self, result: RunResult) -> None:
        failed = [cell for cell in result.record.cells if cell.exit_code]
        self.exit_code = result.record.exit_code
        worst = next(cell for cell in failed if cell.exit_code == self.exit_code)
        more = f"{len(failed)} of {len(result.record.cells)} cells failed; the worst is {worst.name}"
        super().__init__(f"{more}: {worst.message}", worst.remedy or f"See {result.output / OVERVIEW}.")


def plan_run(cells: Sequence[Cell], output: Path, force: bool = False) -> Plan:
    """Find out which cells must be made; nothing is written.

    Args:
        force: make every cell again.

    Raises:
        UsageError: the output folder, or the place of a bundle, cannot be written or holds something else.
    """
    if (output / MANIFEST).exists():
        raise UsageError(f"{output} is a bundle, expected the folder of a run.", "Name another output.")
    if output.is_dir() and any(output.iterdir()) and not (output / RUN).exists():
        raise UsageError(f"{output} exists and is not the folder of a run: it has no {RUN}.", "Name a new folder.")
    check_output_file(output / RUN, force=True)
    before: dict[str, CellRecord] = {}
    if (output / RUN).exists():
        before = {cell.name: cell for cell in load_run(output).cells}
    digests: dict[str, str] = {}
    planned = []
    for cell in cells:
        check_output_folder(output / cell.model / cell.variant, force=True)
        known = before.get(cell.name)
        kept = None if force or known is None else _unchanged(known, cell, output, digests)
        planned.append(Planned(cell, kept, known.peak_bytes if known else 0))
    return Plan(output, tuple(planned))


def _unchanged(known: CellRecord, cell: Cell, output: Path, digests: dict[str, str]) -> CellRecord | None:
    """The record of a cell whose command, inputs and bundle are as they were; else None."""
    if not known.digest or known.command != cell.command(output) or known.inputs.open_ended or cell.open_ended:
        return None
    for path, digest in known.inputs.files.items():
        if path not in digests:
            digests[path] = digest_of(Path(path))
        if digests[path] != digest:
            return None
    for name, digest in known.inputs.packages.items():
        if digests.setdefault(f"package {name}", package_digest(name)) != digest:
            return None
    try:
        check_bundle(output / cell.model / cell.variant, known.digest)
    except (UsageError, IntegrityError):
        return None
    folder = output / cell.model / cell.variant
    facts = _facts(folder, load_report(folder))  # a device may have finished it
    facts = replace(facts, latency_ms=facts.latency_ms | kept_latency(known.facts))
    return replace(known, unchanged=True, facts=facts)


def run_cells(
    plan: Plan, make: Make, workers: Callable[[], Workers], progress: Progress = silent, bench: bool = False
) -> RunResult:
    """Make the cells that changed, and write the overview; ``scconv-deploy run``.

    A cell that fails stops nothing else. An interrupt keeps the cells that have ended, and names the others.

    Args:
        make: a function of a module.
        workers: makes the processes; not called if nothing is to be made.
        bench: time the ONNX files here, when no cell is being made any more.
    """
    output = plan.output
    records = {one.cell.name: one.kept or _not_done(one, output) for one in plan.planned}
    todo = [one for one in plan.planned if one.kept is None]
    processes = workers() if todo else None  # before anything is written: there may be no cluster
    with locked_folder(output):
        _write(output, records)
        try:
            if processes is not None:
                with scratch_folder(output) as scratch:
                    for cell, record in _made(todo, output, scratch, make, processes, progress):
                        records[cell.name] = record
                        _write(output, records)
                        progress(Notice(_line(record)))
            if bench:
                records |= timed(output, records, progress)
                _write(output, records)
        except KeyboardInterrupt:
            left = [name for name, record in records.items() if record.status == "not done"]
            more = f"; left: {', '.join(left)}" if left else ", and not all are timed"
            progress(Notice(f"{len(records) - len(left)} of {len(records)} cells are done{more}"))
            raise
    return RunResult(output, RunRecord(SCHEMA_VERSION, tuple(records.values())))


def _made(
    todo: Sequence[Planned], output: Path, scratch: Path, make: Make, workers: Workers, progress: Progress
) -> Iterator[tuple[Cell, CellRecord]]:
    """Make cells; yield each with its record as it ends, its bundle in its place."""
    planned = {one.cell.name: one for one in todo}
    folders = {name: scratch / str(number) for number, name in enumerate(planned)}
    with luggage_for([one.cell for one in todo], workers) as luggage:
        tasks = []
        for name, one in planned.items():
            command = one.cell.command(output)
            there = (make, one.cell, command, luggage.get(name), workers.within)
            here = (make, one.cell, str(folders[name]), command)
            work, arguments = (make_there, there) if workers.elsewhere else (make_cell, here)
            tasks.append(Task(name, work, arguments, one.memory_bytes, fresh=True))
        doing: dict[str, str] = {}
        began: dict[str, float] = {}
        ended = 0

        def tell(name: str, text: str) -> None:
            if name:
                began.setdefault(name, time.perf_counter())
                doing[name] = text
            progress(f"{ended} of {len(tasks)} cells; {'; '.join(f'{name}: {text}' for name, text in doing.items())}")

        with closing(workers.run(tasks, tell)) as outcomes:
            for outcome in outcomes:
                ended += 1
                doing.pop(outcome.name, None)
                one, now = planned[outcome.name], time.perf_counter()
                record = _record(one, output, folders[outcome.name], outcome)
                yield one.cell, replace(record, seconds=now - began.get(outcome.name, now))


def _record(one: Planned, output: Path, made: Path, outcome: Outcome) -> CellRecord:
    """Record of a cell that ended; its bundle is moved to its place."""
    cell, record = one.cell, _not_done(one, output)
    record = replace(record, peak_bytes=outcome.peak_bytes or record.peak_bytes)
    try:
        if outcome.failure is None:
            found: Made = outcome.value
            if found.packed:
                unpack(found.packed, made)
            digest, report = check_bundle(made), load_report(made)
            facts, place = _facts(made, report), output / cell.model / cell.variant
            place_folder(made, place)
            return replace(
                record, **_verdict(report, place / facts.artifact), digest=digest, facts=facts, inputs=found.inputs
            )
        failure = outcome.failure
    except (ScconvDeployError, OSError, tarfile.TarError) as error:
        failure = failure_of(error)
    return replace(record, status="error", exit_code=failure.exit_code, message=failure.message, remedy=failure.remedy)


def _not_done(one: Planned, output: Path) -> CellRecord:
    cell = one.cell
    return CellRecord(
        cell.model, cell.variant, cell.name, cell.command(output), "not done", 130,
        "The run ended before.", "Run it again: what is done is kept.", peak_bytes=one.memory_bytes,
    )  # fmt: skip


def _verdict(report: ParityReport, artifact: Path) -> dict[str, Any]:
    """Status, exit code, message and remedy of a cell with a report, as ``deploy`` gives them."""
    if report:
        return {"status": "passed", "exit_code": 0, "message": report.headline, "remedy": ""}
    error = parity_error(artifact, report, f"Do not ship it; see {REPORT}.")
    status: CellStatus = "failed" if report.verdict == "failed" else "not judged"
    return {"status": status, "exit_code": error.exit_code, "message": error.message, "remedy": error.remedy}


def _facts(folder: Path, report: ParityReport) -> CellFacts:
    """Facts of a bundle, with those of the device that finished it."""
    if (folder / DEVICE / MANIFEST).is_file():
        report = merge_files(folder)
    artifact = next(name for name in (MODEL, MODEL + REJECTED) if (folder / name).is_file())
    timed = {engine.backend: engine.latency.p50_ms for engine in report.engines if engine.latency is not None}
    accuracy = report.accuracy
    return CellFacts(
        artifact,
        (folder / artifact).stat().st_size,
        sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        None if accuracy is None else accuracy.artifact,
        None if accuracy is None else accuracy.reference,
        timed,
        {plan.name: plan.bytes_moved for plan in report.plans if plan.bytes_moved is not None},
    )


def _write(output: Path, records: Mapping[str, CellRecord]) -> None:
    """Write ``run.json`` and the pages of the cells as they are now."""
    for name, content in overview_files(RunRecord(SCHEMA_VERSION, tuple(records.values()))).items():
        write_file(output / name, content)


def _line(record: CellRecord) -> str:
    """One line on a cell that ended."""
    text = record.status if record.status != "error" else f"exit {record.exit_code}: {record.message}"
    return f"{record.name}: {text} ({record.seconds:.0f} s)"
