"""The CRU's forms (``--cru``): ONNX Runtime's time on one thread; ``plan_traffic`` has what their engines move.

Every form of a network is exported once, and all forms take turns in ONNX Runtime; what is measured is the time of its
one thread, which stands still while others have the core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnxruntime

from benchmarks.harness import Row, interleave, write
from scconv_deploy.graph.contract import CruForm
from scconv_deploy.model.inputs import InputSpec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.workflows.export import ExportOptions, export_spec
from scconv_deploy.zoo import MODELS

BASELINE = "as-is"
_COLUMNS = {
    "network": "network",
    "batch": "batch",
    "form": "variant",
    "median": "median_s",
    "min": "min_s",
    "faster than as-is": "speedup",
    "p25": "speedup_p25",
    "p75": "speedup_p75",
    "differs by": "max_abs_error",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", default="resnet20:32,resnet50:1,resnet50:8", help="network:batch, comma-separated")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=2)


def run(options: argparse.Namespace) -> None:
    rows: list[Row] = []
    for case in options.cases.split(","):
        network, batch = case.split(":")
        rows += _case(f"scconv_{network}", int(batch), options)
    write(options.results, rows, _COLUMNS, seed=options.seed, threads=1, warmup=options.warmup)


def _case(network: str, batch: int, options: argparse.Namespace) -> list[Row]:
    shape = (batch, *MODELS[network].input_shape[1:])
    x = np.random.default_rng(options.seed).standard_normal(shape).astype(np.float32)
    files = {form: _exported(network, shape, options.seed, form) for form in get_args(CruForm)}
    sessions = {form: _session(data) for form, data in files.items()}
    name = next(iter(sessions.values())).get_inputs()[0].name
    outputs = {form: session.run(None, {name: x})[0] for form, session in sessions.items()}
    calls = {form: lambda session=session: session.run(None, {name: x}) for form, session in sessions.items()}
    timing = interleave(calls, options.rounds, options.warmup, time.thread_time)
    rows = []
    for form in files:
        row = {"network": network, "batch": batch, **timing.row(form, BASELINE)}
        row["max_abs_error"] = float(np.abs(outputs[form] - outputs[BASELINE]).max())
        rows.append(row)
        print(" ".join(str(row.get(key)) for key in _COLUMNS.values()), flush=True)
    return rows


def _exported(network: str, shape: tuple[int, ...], seed: int, form: CruForm, **options: Any) -> bytes:
    spec = ModelSpec(network, inputs=(InputSpec.parse("x".join(map(str, shape))),), seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        return export_spec(spec, Path(folder) / "model.onnx", ExportOptions(cru=form, **options)).path.read_bytes()


def _session(data: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
