"""int8 in ONNX Runtime on this CPU beside fp32: time, which convolutions run as integers, and what the kernels change.

ONNX Runtime makes an integer kernel of a convolution only where its output is quantised too. Our files leave outputs in
float before SRUs and sums; ONNX Runtime's own quantiser, on the same file, does not.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

import scconv_deploy
from benchmarks.harness import Row, interleave, write
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_spec
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.system.cpu import int8_instructions
from scconv_deploy.verification.metrics import relative_l2
from scconv_deploy.workflows.calibrate import CalibrationOptions
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from scconv_deploy.workflows.quantize import QuantizeOptions, quantize_model

_OPTIONS = RuntimeOptions(threads=1)
_COLUMNS = {
    "network": "network",
    "file": "variant",
    "median": "median_s",
    "faster than fp32": "speedup",
    "p25": "speedup_p25",
    "p75": "speedup_p75",
    "integer convolutions": "integer",
    "of": "convolutions",
    "rel. L2 from float arithmetic": "kernels_l2",
    "rel. L2 from fp32": "cost_l2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", default=["scconv_resnet20", "scconv_resnet50"], metavar="MODEL")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=2)


def run(options: argparse.Namespace) -> None:
    rows = [row for name in options.networks for row in _network(name, options)]
    write(
        options.results, rows, _COLUMNS,
        seed=options.seed, batch=options.batch, threads_of_latency=1, int8_instructions=str(int8_instructions()),
    )  # fmt: skip


def _network(name: str, options: argparse.Namespace) -> list[Row]:
    spec = scconv_deploy.ModelSpec(name, seed=options.seed).resolved()
    spec = replace(spec, inputs=tuple(replace(i, shape=(options.batch, *i.shape[1:])) for i in spec.inputs))
    log = StageLog()
    reference, _ = reference_from_spec(spec)
    float_file = onnx.load_model_from_string(serialize(export_to_ir(reference, ExportOptions(), log)))
    entry = float_file.graph.input[0]
    sizes = [d.dim_value for d in entry.type.tensor_type.shape.dim][1:]
    rng = np.random.default_rng(options.seed)
    images = rng.standard_normal((8, options.batch, *sizes)).astype(np.float32)
    files = {"fp32": float_file, "int8": None, "int8, --target cpu": None, "int8, --target cpu --reduce-range": None}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "rows.npz", **{entry.name: images.reshape(-1, *sizes)})
        for label in list(files)[1:]:
            given = QuantizeOptions(
                CalibrationOptions(str(Path(folder) / "rows.npz"), samples=8),
                target="cpu" if "cpu" in label else "gpu", reduce_range="reduce" in label,
            )  # fmt: skip
            files[label] = quantize_model(float_file, "0" * 64, given, log).proto
        label = "ONNX Runtime's quantiser: Conv and Gemm, uint8, outputs too"
        files[label] = _by_onnxruntime(float_file, entry.name, images, Path(folder))
    feed = {entry.name: images[0]}
    runners = {label: OnnxRuntimeRunner(model, _OPTIONS) for label, model in files.items()}
    timing = interleave(
        {label: (lambda one=one: one.run(feed)) for label, one in runners.items()},
        options.rounds, options.warmup, time.thread_time,
    )  # fmt: skip
    return [
        {"network": name} | timing.row(label, "fp32") | _facts(label, model, runners, float_file, feed)
        for label, model in files.items()
    ]


def _by_onnxruntime(model: onnx.ModelProto, name: str, images: np.ndarray, folder: Path) -> onnx.ModelProto:
    class Rows(CalibrationDataReader):
        left = iter({name: one} for one in images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.left, None)

    onnx.save(model, folder / "float.onnx")
    quantize_static(
        folder / "float.onnx", folder / "int8.onnx", Rows(), op_types_to_quantize=["Conv", "Gemm"], per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return onnx.load(folder / "int8.onnx")


def _facts(
    label: str, model: onnx.ModelProto, runners: dict[str, OnnxRuntimeRunner], float_file: onnx.ModelProto,
    feed: dict[str, np.ndarray],
) -> Row:  # fmt: skip
    counts = _optimised(model)
    convolutions = sum(number for op, number in counts.items() if op.endswith("Conv"))
    output = runners[label].outputs[0]
    here = runners[label].run(feed)[output]
    plain = OnnxRuntimeRunner(model, RuntimeOptions(threads=1, optimization="none")).run(feed)[output]
    expected = runners["fp32"].run(feed)[output]
    return {
        "integer": counts["QLinearConv"], "convolutions": convolutions,
        "kernels_l2": relative_l2(here, plain), "cost_l2": relative_l2(plain, expected),
    }  # fmt: skip


def _optimised(model: onnx.ModelProto) -> Counter[str]:
    """Operators of a model after ONNX Runtime's optimisations."""
    with tempfile.TemporaryDirectory() as folder:
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4
        settings.optimized_model_filepath = str(Path(folder) / "optimised.onnx")
        onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
        return Counter(node.op_type for node in onnx.load(settings.optimized_model_filepath).graph.node)
