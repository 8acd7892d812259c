"""Share of multiply-adds in int8 by the form of the CRUs: merged convolutions have no module, and stay in float."""

from __future__ import annotations

import argparse
from functools import partial
from typing import get_args

import onnx_ir as ir

from benchmarks.harness import write
from scconv_deploy.graph.contract import CruForm
from scconv_deploy.model.fake_quantize import unprovable
from scconv_deploy.model.prepare import reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.precision.int8 import prepared
from scconv_deploy.precision.placement import PlacementOptions
from scconv_deploy.workflows.export import ExportOptions, export_to_ir

_COLUMNS = {
    "CRU": "cru",
    "Conv and Gemm": "layers",
    "in int8": "quantized",
    "multiply-adds": "multiply_adds",
    "in int8, share": "share",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="scconv_resnet20", help="of the zoo (default scconv_resnet20)")


def run(options: argparse.Namespace) -> None:
    reference, log = reference_from_spec(ModelSpec(options.model, seed=options.seed))
    rows = []
    for cru in get_args(CruForm):
        proto = ir.to_proto(export_to_ir(reference, ExportOptions(cru=cru), log))
        placement = prepared(proto, PlacementOptions(), partial(unprovable, reference.model)).placement
        layers = sum(node.op_type in ("Conv", "Gemm") for node in proto.graph.node)
        if placement.multiply_adds is None:
            raise ValueError(f"{options.model} has a shape that is not known")
        part, total = placement.multiply_adds
        rows.append({
            "cru": cru, "layers": layers, "quantized": len(placement.layers), "multiply_adds": total,
            "share": part / total,
        })  # fmt: skip
    write(options.results, rows, _COLUMNS, model=options.model)
