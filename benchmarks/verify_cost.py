"""What a full fp32 verification costs, against one PyTorch pass over the same images.

Session creation is timed apart: it is paid once, however many images there are. Memory is the largest resident size of
a process that verifies a file, as ``scconv-deploy verify`` does, beside that of one that has loaded the model and run
one pass; exporting is in neither.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch

from benchmarks import subjects
from benchmarks.environment import THREADS
from benchmarks.harness import write
from scconv_deploy.exporters.onnx import serialize
from scconv_deploy.exporting import ExportOptions, export_to_ir
from scconv_deploy.margins import MARGIN_EDGES
from scconv_deploy.references import reference_from_module
from scconv_deploy.spec import ModelSpec, load
from scconv_deploy.verification import tolerances
from scconv_deploy.verification.artifact import ArtifactMeasurement
from scconv_deploy.verification.measure import Measured
from scconv_deploy.verification.runners.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.samples import Sample
from scconv_deploy.verification.torch_reference import TorchReference

_COLUMNS = {
    "model": "model",
    "images": "images",
    "one PyTorch pass": "pass_s",
    "verification": "verify_s",
    "of it sessions": "sessions_s",
    "times one pass, sessions apart": "ratio",
    "the same in processor time": "cpu_ratio",
    "peak MB": "peak_mb",
    "peak MB of one pass": "pass_peak_mb",
    "weights MB": "weights_mb",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="scconv_resnet50")
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help=argparse.SUPPRESS)  # what a process of its own does


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(THREADS)
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
        print(json.dumps(_measure(reference, Path(options.only), image, call, options.rounds)))
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(serialize(export_to_ir(reference, ExportOptions(), log)))
        row = {"model": options.model, "images": options.images, **_alone(options, "pass"), **_alone(options, path)}
    row["weights_mb"] = round(sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6)
    write(options.results, [row], _COLUMNS, shape=shape, bins=len(MARGIN_EDGES) - 1)


def _alone(options: argparse.Namespace, what: str | Path) -> dict[str, Any]:
    """Run one part in a process of its own, for its memory."""
    arguments = ["--model", options.model, "--images", str(options.images), "--rounds", str(options.rounds)]
    command = [sys.executable, "-m", "benchmarks", "verify_cost", *arguments, "--seed", str(options.seed)]
    done = subprocess.run([*command, "--only", str(what)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _measure(reference, path: Path, image: torch.Tensor, call, rounds: int) -> dict[str, Any]:
    proto = onnx.load(path)
    rows = [_round(reference, proto, image, call) for _ in range(rounds)]
    middle = sorted(rows, key=lambda row: row["ratio"])[len(rows) // 2]
    return {**middle, "peak_mb": _peak_mb(), "ratios": [row["ratio"] for row in rows]}


def _round(reference, proto: onnx.ModelProto, image: torch.Tensor, call) -> dict[str, float]:
    creating = creating_cpu = 0.0
    start_session = OnnxRuntimeRunner.__init__

    def timed(self, *arguments):
        nonlocal creating, creating_cpu
        seconds, cpu = _seconds(lambda: start_session(self, *arguments))
        creating, creating_cpu = creating + seconds, creating_cpu + cpu

    passes = [_seconds(call) for _ in range(2)]
    OnnxRuntimeRunner.__init__ = timed  # type: ignore[method-assign]
    try:
        seconds, cpu = _seconds(lambda: _verify(reference, proto, image))
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


def _verify(reference, proto: onnx.ModelProto, image: torch.Tensor) -> None:
    source, measured = TorchReference(reference), Measured(tolerances.table())
    with ArtifactMeasurement(source, proto, measured, RuntimeOptions(threads=THREADS)) as measurement:
        measurement.run(source.run(Sample("noise", {"image": image})))


def _seconds(work) -> tuple[float, float]:
    """Wall clock, and processor time of all threads, which others do not lengthen."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def _peak_mb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
