"""What a full fp32 verification costs, against one PyTorch pass over the same images.

Timed is what ``scconv-deploy verify`` does once the model and the file are read: runs, static link, weights, judging
and ``report.json``. Session creation is timed apart: it is paid once, however many images there are. Memory is the
largest resident size of a process that verifies a file beside that of one that has loaded the model and run one pass;
exporting is in neither.

A row for two threads, as users have them, and one for one: with several, the threads of PyTorch spin while they wait
for one another, so that on a shared machine processor time counts waiting too; with one it does not.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks import subjects
from benchmarks.environment import THREADS, other_cores
from benchmarks.harness import write
from scconv_deploy.graph.file import read_onnx, serialize
from scconv_deploy.model.load import load
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.onnx.parity import Artifact, Judging, Reference, verify_onnx
from scconv_deploy.verification.samples import Sample
from scconv_deploy.workflows.export import ExportOptions, export_to_ir

_COLUMNS = {
    "model": "model",
    "images": "images",
    "threads": "threads",
    "one PyTorch pass": "pass_s",
    "verification": "verify_s",
    "of it sessions": "sessions_s",
    "times one pass, sessions apart": "ratio",
    "the same in processor time": "cpu_ratio",
    "peak MB": "peak_mb",
    "peak MB of one pass": "pass_peak_mb",
    "weights MB": "weights_mb",
    "cores busy with others": "other_cores",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="scconv_resnet50")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    # what a process of its own does, and with how many threads
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, default=THREADS, help=argparse.SUPPRESS)


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    model = load(ModelSpec(options.model, seed=options.seed))
    shape = (options.images, *ModelSpec(options.model).resolved().inputs[0].shape[1:])
    image = subjects.noise(shape, options.seed)
    call = subjects.in_torch(model, image)
    if options.only == "pass":
        call()
        print(json.dumps({"pass_peak_mb": _peak_mb()}))
        return
    reference, log = reference_from_module(model, image)
    if options.only:
        print(json.dumps(_measure(reference, Path(options.only), image, call, options)))
        return
    weights_mb = round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6)
    rows = []
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(serialize(export_to_ir(reference, ExportOptions(), log)))
        for threads in (THREADS, 1):
            row = {"model": options.model, "images": options.images, "threads": threads}
            row |= _alone(options, "pass", threads) | _alone(options, path, threads)
            rows.append(row | {"weights_mb": weights_mb, "metadata": {"threads": threads}})
    write(options.results, rows, _COLUMNS, shape=shape)


def _alone(options: argparse.Namespace, what: str | Path, threads: int) -> dict[str, Any]:
    """Run one part in a process of its own, for its memory."""
    arguments = ["--model", options.model, "--images", str(options.images), "--rounds", str(options.rounds)]
    arguments += ["--seed", str(options.seed), "--only", str(what), "--threads", str(threads)]
    command = [sys.executable, "-m", "benchmarks", "verify_cost", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(
    reference: Reference, path: Path, image: torch.Tensor, call: Callable[[], object], options: argparse.Namespace
) -> dict[str, Any]:
    artifact = Artifact(read_onnx(path), path.name, path.read_bytes())
    judging = Judging(runtime=RuntimeOptions(threads=options.threads))

    def verify() -> None:
        report = verify_onnx(reference, artifact, [Sample("noise", {"image": image})], StageLog(), judging=judging)
        if not report:
            raise RuntimeError(report.headline)
        report.as_bytes()

    rows, others = other_cores(lambda: [_round(verify, call) for _ in range(options.rounds)])
    middle = sorted(rows, key=lambda row: row["cpu_ratio"])[len(rows) // 2]
    ratios = {name: [row[name] for row in rows] for name in ("ratio", "cpu_ratio")}
    return {**middle, "peak_mb": _peak_mb(), "rounds": ratios, "other_cores": others}


def _round(verify: Callable[[], object], call: Callable[[], object]) -> dict[str, float]:
    creating = creating_cpu = 0.0
    start_session = OnnxRuntimeRunner.__init__

    def timed(self: OnnxRuntimeRunner, *arguments: Any) -> None:
        nonlocal creating, creating_cpu
        seconds, cpu = _seconds(lambda: start_session(self, *arguments))
        creating, creating_cpu = creating + seconds, creating_cpu + cpu

    passes = [_seconds(call) for _ in range(2)]
    OnnxRuntimeRunner.__init__ = timed  # type: ignore[method-assign]
    try:
        seconds, cpu = _seconds(verify)
    finally:
        OnnxRuntimeRunner.__init__ = start_session  # type: ignore[method-assign]
    passes += [_seconds(call) for _ in range(2)]  # before and after: others use the machine too
    one, one_cpu = statistics.median(s for s, _ in passes), statistics.median(c for _, c in passes)
    return {
        "pass_s": one,
        "verify_s": seconds,
        "sessions_s": creating,
        "ratio": (seconds - creating) / one,
        "cpu_ratio": (cpu - creating_cpu) / one_cpu,
    }


def _seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Wall clock, and processor time of all threads."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
