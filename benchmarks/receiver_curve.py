"""The receiver's curve of the replay: healthy artifacts on one side, damaged ones on the other, in units of the limit.

Every row is one artifact: the worst error of its outputs and layers with the reference's gates, over its limit. Below 1
it passes. Weights are compared bit for bit by another check, which is left out here: these are the faults that only
running the file shows. Healthy: networks of many forms and depths, in three types, at ONNX Runtime's levels of
optimisation. Damaged: the same with one fault planted.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx import TensorProto, helper, numpy_helper

from benchmarks.harness import write
from benchmarks.receiver_networks import LARGE, NETWORKS, network
from scconv_deploy.model.load import load
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.onnx.parity import Artifact, Judging, Reference, verify_onnx
from scconv_deploy.verification.samples import Sample
from scconv_deploy.workflows.export import ExportOptions, export_to_ir, in_precision
from tests.mutations import MUTATIONS, two_heads

PRECISIONS = ("fp32", "fp16", "bf16")
_COLUMNS = {
    "artifact": "artifact",
    "network": "network",
    "type": "precision",
    "level": "level",
    "error / limit": "of_limit",
    "verdict": "verdict",
    "failed checks": "checks",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", default=",".join(NETWORKS), help="comma-separated; empty for none")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--seeds", type=int, default=1, help="of weights and inputs (default 1)")
    parser.add_argument("--large", action="store_true", help="ResNet-50 of ImageNet, plain and with ScConv, too")


def run(options: argparse.Namespace) -> None:
    rows = []
    for row in _rows(options):
        rows.append(row)
        text = f"{row['artifact']:40} {row['network']:40} {row['precision']} {row['of_limit']:10.3g} {row['verdict']}"
        print(text, flush=True)
        write(options.results, rows, _COLUMNS, table=False, summary=summary(rows))  # whatever stops it
    write(options.results, rows, _COLUMNS, summary=summary(rows))


def summary(rows: list[dict]) -> dict[str, dict[str, float | int]]:
    """By type: the largest healthy ratio, the smallest of faults that are caught by the replay, and what is wrong."""
    found: dict[str, dict[str, float | int]] = {}
    for precision in dict.fromkeys(row["precision"] for row in rows):
        mine = [row for row in rows if row["precision"] == precision]
        healthy = [row for row in mine if row["artifact"] == "healthy"]
        damaged = [row for row in mine if row["artifact"] != "healthy"]
        caught = [row["of_limit"] for row in damaged if row["of_limit"] > 1]
        found[precision] = {
            "healthy": len(healthy),
            "healthy_failed": sum(row["verdict"] != "passed" for row in healthy),
            "healthy_largest": max((row["of_limit"] for row in healthy), default=math.nan),
            "damaged": len(damaged),
            "damaged_passed": sum(row["verdict"] == "passed" for row in damaged),
            "damaged_smallest_beyond_the_limit": min(caught, default=math.nan),
        }
    return found


def _rows(options: argparse.Namespace) -> Iterator[dict]:
    for seed in range(options.seed, options.seed + options.seeds):
        for name in filter(None, options.networks.split(",")):
            for calibrated in (True, False):
                model, image = network(name, seed, calibrated), _noise(2, 32, seed)
                label = name if calibrated else f"{name}, as PyTorch begins"
                yield from _of_network(label, *_reference(model, image), options, faults=calibrated)
        yield from _mutations(options, seed)
    if options.large:
        for name in LARGE:
            model = load(ModelSpec(name, seed=options.seed))
            yield from _of_network(name, *_reference(model, _noise(1, 224, options.seed)), options, faults=False)


def _noise(rows: int, size: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _reference(model: torch.nn.Module, image: torch.Tensor) -> tuple[Reference, torch.Tensor]:
    return reference_from_module(model, image)[0], image


def _of_network(
    label: str, reference: Reference, image: torch.Tensor, options: argparse.Namespace, faults: bool
) -> Iterator[dict]:
    for precision in options.precisions.split(","):
        exporting = ExportOptions(precision=precision)
        single = export_to_ir(reference, exporting, StageLog())
        model = ir.to_proto(in_precision(single, exporting, StageLog()))
        for level in ("all", "none"):
            yield _judged("healthy", label, precision, level, reference, model, image)
        for name, damage in FAULTS.items() if faults else ():
            damaged = onnx.ModelProto()
            damaged.CopyFrom(model)
            if damage(damaged):
                yield _judged(name, label, precision, "all", reference, damaged, image)


def _mutations(options: argparse.Namespace, seed: int) -> Iterator[dict]:
    """The faults of the tests that the replay shows, of float32 ScConv-ResNets of two depths."""
    for blocks in (1, 3):
        image = _noise(2, 32, seed)
        reference, _ = _reference(two_heads(blocks, 32, seed), image)
        model = ir.to_proto(export_to_ir(reference, ExportOptions(), StageLog()))
        for name, mutation in MUTATIONS.items():
            if mutation.check != "replay":
                continue
            damaged = onnx.ModelProto()
            damaged.CopyFrom(model)
            mutation.damage(damaged, reference.model)
            yield _judged(name, f"two heads, {6 * blocks + 2} layers", "fp32", "all", reference, damaged, image)


def _judged(
    artifact: str, label: str, precision: str, level: str, reference: Reference, model: onnx.ModelProto, image
) -> dict:
    sample = Sample("noise", {reference.signature.names[0]: image})
    judging = Judging(runtime=RuntimeOptions(optimization=level))
    report = verify_onnx(reference, Artifact(model, "model.onnx", b""), [sample], StageLog(), judging=judging)
    failed = sorted({c.name for link in report.links for c in link.checks if c.status == "failed"} - {"weights"})
    row = {"artifact": artifact, "network": label, "precision": precision, "level": level}
    verdict = "failed" if failed else "passed"
    return row | {"of_limit": of_limit(report), "verdict": verdict, "checks": ", ".join(failed)}


def of_limit(report: ParityReport) -> float:
    """The worst error of replay and layers, over the limit that it was judged by."""
    quantities = [
        quantity
        for link in report.links
        for check in link.checks
        if check.name in ("replay", "layers")
        for quantity in check.quantities
        if quantity.tolerance in ("replay_multiple", "half_multiple")
    ]
    found = [q.value / q.limit for q in quantities]
    return max((value if value == value else math.inf for value in found), default=math.nan)


# --- faults of any network ---------------------------------------------------------------------------------------


def _weights(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Of convolutions and matrix products, in the graph's order."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return [stored[node.input[1]] for node in nodes if node.input[1] in stored]


def _in_the_middle(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], bool]:
    def damage(model: onnx.ModelProto) -> bool:
        weights = _weights(model)
        tensor = weights[len(weights) // 2]
        array = numpy_helper.to_array(tensor)
        changed = change(array.astype(np.float32)).astype(array.dtype)
        tensor.CopyFrom(numpy_helper.from_array(changed, tensor.name))
        return True

    return damage


def _first_filter(factor: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(weight: np.ndarray) -> np.ndarray:
        weight = weight.copy()
        weight[0] *= factor
        return weight

    return change


def _without(operator: str) -> Callable[[onnx.ModelProto], bool]:
    def damage(model: onnx.ModelProto) -> bool:
        nodes = [node for node in model.graph.node if node.op_type == operator]
        for node in nodes[len(nodes) // 2 :][:1]:
            node.op_type = "Identity"
            del node.attribute[:], node.input[1:]
        return bool(nodes)

    return damage


def _one_value_in_half(model: onnx.ModelProto) -> bool:
    """In a float32 file alone: one activation goes through float16."""
    if any(tensor.data_type != TensorProto.FLOAT for tensor in _weights(model)):
        return False
    nodes = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    node = nodes[len(nodes) // 2]
    index = list(model.graph.node).index(node)
    model.graph.node.insert(index, helper.make_node("Cast", [node.input[0]], ["in_half"], to=TensorProto.FLOAT16))
    model.graph.node.insert(index + 1, helper.make_node("Cast", ["in_half"], ["from_half"], to=TensorProto.FLOAT))
    node.input[0] = "from_half"
    return True


def _other_epsilon(model: onnx.ModelProto) -> bool:
    found = False
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon" and node.op_type.endswith("Normalization"):
                attribute.f, found = 1e-2, True
    return found


FAULTS: dict[str, Callable[[onnx.ModelProto], bool]] = {
    "a layer's weights x 1.01": _in_the_middle(lambda w: w * np.float32(1.01)),
    "a layer's weights x 1.1": _in_the_middle(lambda w: w * np.float32(1.1)),
    "a filter x 1.01": _in_the_middle(_first_filter(1.01)),
    "a filter lost": _in_the_middle(_first_filter(0.0)),
    "filters in another order": _in_the_middle(lambda w: w[::-1].copy()),
    "an activation dropped": _without("Relu"),
    "one value in float16": _one_value_in_half,
    "eps of norms 1e-2": _other_epsilon,
}
