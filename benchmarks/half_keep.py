"""What keeping an operator in float32 is worth in a half file: error of the outputs with all kept, one not, and none.

Two things can go wrong in half. A value is rounded: every value is, as the file says, in
``scconv_deploy.runtimes.stand_in``. A runtime adds up in half: the means are also taken one term after the other in
half, of the network's own values. Only operators that the network has are listed; the others' reasons are ranges.
"""

from __future__ import annotations

import argparse
from collections import Counter
from unittest.mock import patch

import numpy as np
import onnx
import onnx_ir as ir
import torch

from benchmarks import subjects
from benchmarks.half_error import NETWORKS
from benchmarks.harness import Row, write
from scconv_deploy.graph.types import FIRST_OPSET, NUMPY, HalfPrecision
from scconv_deploy.precision import half
from scconv_deploy.precision.half import HalfOptions, to_half
from scconv_deploy.runtimes.stand_in import stand_in
from scconv_deploy.verification.metrics import relative_l2

_SUBJECTS = ("scconv_resnet20", "scconv_resnet50")
_COLUMNS = {
    "network": "network",
    "type": "precision",
    "in half instead": "in_half",
    "nodes of it": "nodes",
    "casts": "casts",
    "outputs, rel. L2": "l2",
    "times all kept": "times_kept",
    "means added up in half, worst rel. L2": "summed_in_half_l2",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(_SUBJECTS), metavar="NAME")


def run(options: argparse.Namespace) -> None:
    rows: list[Row] = []
    for name in options.networks:
        model, image = NETWORKS[name](options.seed)
        with torch.inference_mode():
            expected = model(image)
        for precision in ("fp16", "bf16"):
            float32_model = onnx.load_model_from_string(subjects.our_onnx(model, image, opset=FIRST_OPSET[precision]))
            held = Counter(node.op_type for node in float32_model.graph.node if node.op_type in half.KEPT_OPERATORS)
            kept = 0.0
            for given in ((), *((operator,) for operator in held), tuple(held)):
                file = _converted(float32_model, precision, given)
                found = relative_l2(
                    subjects.in_ort(stand_in(file).SerializeToString(), image)().numpy(), expected.numpy()
                )
                kept = kept or found
                row: Row = {"network": name, "precision": precision, "in_half": ", ".join(given) or "none: all kept"}
                row["nodes"] = sum(held[operator] for operator in given)
                row["casts"] = sum(node.op_type == "Cast" for node in file.graph.node)
                row["l2"], row["times_kept"] = found, found / kept
                if "ReduceMean" in given:
                    row["summed_in_half_l2"] = _summed_in_half(float32_model, image.numpy(), precision)
                rows.append(row)
                print(row, flush=True)
    write(options.results, rows, _COLUMNS, seed=options.seed)


def _converted(float32_model: onnx.ModelProto, precision: HalfPrecision, given: tuple[str, ...]) -> onnx.ModelProto:
    """Converted with these operators in half too."""
    kept = {name: why for name, why in half.KEPT_OPERATORS.items() if name not in given}
    with patch.dict(half.KEPT_OPERATORS, kept, clear=True):
        return ir.to_proto(to_half(ir.from_proto(float32_model), HalfOptions(precision)).model)


def _summed_in_half(float32_model: onnx.ModelProto, image: np.ndarray, precision: HalfPrecision) -> float:
    """The worst ReduceMean of the graph, over H and W, if a runtime adds one term after the other in half."""
    opened = onnx.ModelProto()
    opened.CopyFrom(float32_model)
    values = [node.input[0] for node in float32_model.graph.node if node.op_type == "ReduceMean"]
    del opened.graph.output[:]
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in values)
    session = subjects.session(opened.SerializeToString())
    worst = 0.0
    for x in session.run(None, {session.get_inputs()[0].name: image}):
        terms = x.reshape(*x.shape[:2], -1).astype(NUMPY[precision])
        total = np.zeros(x.shape[:2], dtype=NUMPY[precision])
        for index in range(terms.shape[-1]):
            total = total + terms[..., index]
        mean = total.astype(np.float32) / terms.shape[-1]
        worst = max(worst, relative_l2(mean, terms.astype(np.float32).mean(-1)))
    return worst
