"""ScConv-ResNet-20, or a network of volumes or signals, damaged on purpose, fault by fault: which checks catch each."""

from __future__ import annotations

import argparse
import math

import onnx
import torch

from benchmarks.harness import write
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.stage import StageLog
from scconv_deploy.verification.onnx.parity import Artifact, verify_onnx
from scconv_deploy.verification.samples import noise_samples
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from tests.mutations import MUTATIONS, two_heads
from tests.other_gates import DAMAGE, two_masks

_COLUMNS = {
    "damage": "damage",
    "verdict": "verdict",
    "caught by": "checks",
    "x noise": "times_noise",
    "first departure": "departure",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--blocks", type=int, default=3, help="of each stage: 3 is ResNet-20")
    parser.add_argument("--dims", type=int, choices=(1, 2, 3), default=2, help="3: volumes, 1: signals (default 2)")


def run(options: argparse.Namespace) -> None:
    side = {1: 256, 2: 32, 3: 12}[options.dims]
    image = torch.randn(2, 3, *[side] * options.dims, generator=torch.Generator().manual_seed(options.seed))
    reference, log = reference_from_module(two_heads(options.blocks, side, dims=options.dims), image)
    content = serialize(export_to_ir(reference, ExportOptions(), log))
    rows = []
    for name, mutation in {"none": None, **MUTATIONS}.items():
        model = onnx.load_model_from_string(content)
        if mutation is not None:
            mutation.damage(model, reference.model)
        artifact = Artifact(model, "model.onnx", model.SerializeToString())
        report = verify_onnx(reference, artifact, noise_samples(reference.signature, 0), StageLog())
        failed = {c.name for link in report.links for c in link.checks if c.status == "failed"}
        row = {"damage": name, "verdict": report.verdict, "checks": ", ".join(sorted(failed))}
        row["times_noise"] = max(ratios(report), default=None)
        rows.append(row | {"departure": report.first_departure})
    write(options.results, [*rows, *_other_gates(options)], _COLUMNS)


def _other_gates(options: argparse.Namespace) -> list[dict]:
    """The same of gates of no known SRU."""
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(options.seed))
    reference, log = reference_from_module(two_masks(), image)
    content = serialize(export_to_ir(reference, ExportOptions(), log))
    rows = []
    for name, damage in {"none": None, **DAMAGE}.items():
        model = onnx.load_model_from_string(content)
        if damage is not None:
            damage.damage(model)
        artifact = Artifact(model, "model.onnx", model.SerializeToString())
        report = verify_onnx(reference, artifact, noise_samples(reference.signature, 0), StageLog())
        failed = {c.name for link in report.links for c in link.checks if c.status == "failed"}
        row = {"damage": f"no SRU: {name}", "verdict": report.verdict, "checks": ", ".join(sorted(failed))}
        row["times_noise"] = max(ratios(report), default=None)
        rows.append(row | {"departure": report.first_departure})
    return rows


def ratios(report: ParityReport) -> list[float]:
    """What the replay and the layers show, in multiples of the noise."""
    quantities = [q for link in report.links for check in link.checks for q in check.quantities]
    return [q.value for q in quantities if q.tolerance == "replay_multiple" and math.isfinite(q.value)]
