"""A run file on two cores against its cells' own work, the second run, and a large data set on one worker and on two.

``cells``: models x precisions x backends, made one after the other on one core (the cells' own work), then by one run
with as many processes as cores. ``overhead`` is the run's time over the own work shared out evenly: 1 is perfect, the
aim is 1.15. Then the same run again, which has nothing to do: the aim is 5 s.

``rows``: ``verify`` on images of noise, by Ray with one worker and with two (``--engines local`` for processes of this
machine); the aim is 1.6 times. ``free`` is the time of the rows that run free alone. Then a worker is killed in the
middle: the report must be the same.

The cores must be idle otherwise: ``other_cores`` says how many were not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import other_cores
from benchmarks.harness import Row, write
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.report.runs.load import load_run
from scconv_deploy.verification.options import Checks
from scconv_deploy.workers.tasks import Outcome, Task, Tell, Workers
from scconv_deploy.workflows.export import ExportOptions, export_spec
from scconv_deploy.workflows.subject import OnnxFile
from scconv_deploy.workflows.verify import verify_subject

_COLUMNS = {
    "what": "what",
    "cells": "cells",
    "images": "images",
    "processes": "jobs",
    "wall clock": "wall_s",
    "own work": "own_s",
    "overhead": "overhead",
    "rows that run free": "free_s",
    "speedup": "speedup",
    "same report": "same",
    "cores busy with others": "other_cores",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--parts", nargs="+", choices=("cells", "rows"), default=("cells", "rows"))
    parser.add_argument("--models", nargs="+", default=("scconv_resnet20", "scconv_resnext29", "resnet20"))
    parser.add_argument("--precisions", nargs="+", default=("fp32", "fp16", "bf16"))
    parser.add_argument("--backends", nargs="+", default=("onnx", "tensorrt-rtx"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--model", default="scconv_resnet20", help="of the rows")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--engines", nargs="+", choices=("local", "ray"), default=("ray",))


def run(options: argparse.Namespace) -> None:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in _all(options, Path(folder)):
            print(json.dumps(row), flush=True)
            rows.append(row)
    write(options.results, rows, _COLUMNS, seed=options.seed, jobs=options.jobs)


def _all(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    if "cells" in options.parts:
        yield from _cells(options, folder)
    for engine in options.engines if "rows" in options.parts else ():
        yield from _rows(options, engine, folder)


# --- cells -------------------------------------------------------------------------------------------------------


def _cells(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    lines = ["[run]", 'output = "{output}"', "[defaults]", f"seed = {options.seed}", "no-cache = true"]
    for model in options.models:
        lines += ["[[models]]", f'name = "{model}"', f'model = "{model}"']
    for precision in options.precisions:
        for backend in options.backends:
            lines += ["[[variants]]", f'name = "{precision}-{backend}"', f'precision = "{precision}"']
            lines += [f'backend = "{backend}"'] + ['target = "sm89"'] * (backend != "onnx")
    one_core = {min(os.sched_getaffinity(0))}
    own = 0.0
    for name, jobs, cores in (
        ("one by one", 1, one_core), ("together", options.jobs, None), ("again", options.jobs, None)
    ):  # fmt: skip
        output, file = folder / ("alone" if cores else "together"), folder / f"{name}.toml"
        file.write_text("\n".join(lines).replace("{output}", str(output)), encoding="utf-8")
        seconds, others = other_cores(partial(_command, ["run", str(file), "--jobs", str(jobs)], cores))
        found = load_run(output).cells
        row: Row = {"what": name, "cells": len(found), "jobs": jobs, "wall_s": seconds, "other_cores": others}
        if cores:
            own = sum(cell.seconds for cell in found)
        elif name == "together":
            row |= {"own_s": own, "overhead": seconds / (own / jobs)}
        yield row | {"statuses": sorted({cell.status for cell in found})}


def _command(arguments: Sequence[str], cores: set[int] | None) -> float:
    """Wall clock of a command, on these cores."""
    prepare = None if cores is None else lambda: os.sched_setaffinity(0, cores)
    start = time.perf_counter()
    command = [sys.executable, "-m", "scconv_deploy", *arguments, "--quiet"]
    done = subprocess.run(command, preexec_fn=prepare, check=False)
    if done.returncode not in (0, 6):
        raise SystemExit(f"{' '.join(arguments)} exited with {done.returncode}")
    return time.perf_counter() - start


# --- rows --------------------------------------------------------------------------------------------------------


class _Timed:
    """Workers whose tasks are timed together.

    Args:
        marks: folder in which each task names its process; after the first outcome, one that is at work is killed, as a
            lost machine would end. None kills nothing.
    """

    within = None

    def __init__(self, workers: Workers, marks: Path | None = None) -> None:
        self.jobs, self.elsewhere, self.sharing = workers.jobs, workers.elsewhere, workers.sharing
        self._workers, self._marks = workers, marks
        self.seconds, self.killed = 0.0, False

    def run(self, tasks: Sequence[Task], tell: Tell) -> Generator[Outcome]:
        start = time.perf_counter()
        if self._marks is not None:
            tasks = [
                replace(task, work=_announced, arguments=(str(self._marks), task.name, task.work, *task.arguments))
                for task in tasks
            ]
        for outcome in self._workers.run(tasks, tell):
            if self._marks is not None and not self.killed:
                (self._marks / outcome.name).unlink()
                at_work = sorted(self._marks.iterdir())
                if at_work:
                    os.kill(int(at_work[0].read_text()), signal.SIGKILL)
                    self.killed = True
            yield outcome
        self.seconds = time.perf_counter() - start


def _announced(marks: str, name: str, work: Any, *arguments: Any) -> Any:
    """Run a task after writing down its process."""
    Path(marks, name).write_text(str(os.getpid()), encoding="ascii")
    return work(*arguments)


def _rows(options: argparse.Namespace, engine: str, folder: Path) -> Iterator[Row]:
    spec = ModelSpec(options.model, seed=options.seed)
    shape = spec.resolved().inputs[0].shape
    file, data = folder / "model.onnx", folder / "rows.npz"
    export_spec(spec, file, ExportOptions(), force=True)
    images = np.random.default_rng(options.seed).standard_normal((options.images, *shape[1:]), dtype=np.float32)
    np.savez(data, image=images)
    reports: dict[str, Any] = {}
    baseline = 0.0
    for what, jobs, kill in (("warm-up", options.jobs, False), ("one", 1, False), ("all", options.jobs, False),
                             ("one killed", options.jobs, engine == "ray")):  # fmt: skip
        if what == "one killed" and not kill:
            continue
        marks = Path(tempfile.mkdtemp(dir=folder)) if kill else None
        workers = _Timed(_workers(engine, jobs), marks)
        (report, seconds), others = other_cores(partial(_verified, file, spec, Checks(str(data), workers=workers)))
        if what == "warm-up":  # workers import PyTorch once
            continue
        document = report.as_json()
        for stage in document["stages"]:
            del stage["seconds"]
        reports[what] = document
        baseline = baseline or workers.seconds
        yield {
            "what": f"rows, {engine}, {what}", "images": options.images, "jobs": jobs, "wall_s": seconds,
            "free_s": workers.seconds, "speedup": baseline / workers.seconds, "same": document == reports["one"],
            "other_cores": others, "killed": workers.killed,
        }  # fmt: skip


def _verified(file: Path, spec: ModelSpec, checks: Checks) -> tuple[Any, float]:
    start = time.perf_counter()
    report = verify_subject(OnnxFile(file), spec, checks)
    return report, time.perf_counter() - start


def _workers(engine: str, jobs: int) -> Workers:
    if engine == "local":
        from scconv_deploy.workers.local import LocalWorkers

        return LocalWorkers(jobs, ["scconv_deploy.verification.onnx.shards"])
    import ray

    from scconv_deploy.workers.cluster import ClusterWorkers

    if not ray.is_initialized():
        ray.init("local", num_cpus=os.cpu_count(), log_to_driver=False, logging_level="ERROR")
    return ClusterWorkers(jobs=jobs)
