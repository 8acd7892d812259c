"""Two hundred healthy exports and inputs, all of which must pass: images, volumes and signals; seeds, variants,
batches, ORT levels and threads."""

from __future__ import annotations

import argparse
import itertools

import onnx
import torch

from benchmarks.harness import write
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.onnx.parity import Artifact, Judging, verify_onnx
from scconv_deploy.verification.samples import Sample
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from scconv_deploy.zoo.cifar_resnet import CifarResNet
from scconv_deploy.zoo.layers import initialize, scconv3x3
from tests.mutations import RankResNet
from tests.other_gates import GATES, gated

LEVELS = ("none", "basic", "extended", "all")
BATCHES = (1, 2, 5)
SCALES = (1e-2, 1.0, 50.0)
SIZES = {1: (192,), 2: (32, 32), 3: (8, 12, 12)}
_COLUMNS = {
    "variant": "variant",
    "axes": "dims",
    "runs": "runs",
    "passed": "passed",
    "gates": "gates",
    "flips, same input": "forced",
    "flips, running free": "free",
    "unexplained": "unexplained",
    "worst replay, x noise": "worst_replay",
    "worst layer, x noise": "worst_layer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--inputs", type=int, default=9, help="verified on each export (default 9)")


def run(options: argparse.Namespace) -> None:
    subjects = [(name, 2) for name in VARIANTS] + list(zip(VARIANTS, (3, 1, 3), strict=True))
    rows = {
        (name, dims): dict.fromkeys(list(_COLUMNS.values())[2:], 0) | {"variant": name, "dims": dims}
        for name, dims in subjects
    }
    choices = itertools.cycle(itertools.product(LEVELS, (1, 2), BATCHES, SCALES))
    done, failures = 0, []
    for seed in itertools.count(options.seed):
        for (name, dims), row in rows.items():
            reference, content = _export(name, seed, dims)
            for _ in range(options.inputs):
                if done == options.runs:
                    others = [_other_gates(name, options, failures) for name in GATES]
                    write(options.results, [*rows.values(), *others], _COLUMNS, failures=failures)
                    return
                level, threads, batch, scale = next(choices)
                generator = torch.Generator().manual_seed(done)
                image = scale * torch.randn(batch, 3, *SIZES[dims], generator=generator)
                judging = Judging(runtime=RuntimeOptions(threads=threads, optimization=level))
                artifact = Artifact(onnx.load_model_from_string(content), "model.onnx", content)
                sample = Sample("d", {reference.signature.names[0]: image})
                report = verify_onnx(reference, artifact, [sample], StageLog(), judging=judging)
                _add(row, report)
                if not report:
                    failures.append(
                        f"{name}, {dims} axes, seed {seed}, {level}, batch {batch}, {scale}: {report.failures[0]}"
                    )
                    print(failures[-1])
                done += 1


def _export(variant: str, seed: int, dims: int):
    torch.manual_seed(seed)
    net = CifarResNet(1 + seed % 3, scconv3x3(variant=variant)) if dims == 2 else RankResNet(dims, variant=variant)
    model = initialize(net, (8, 3, *SIZES[dims])).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("gn.beta", "SRU.gn.bias")) and seed % 2:
            torch.nn.init.normal_(parameter, std=0.5)
    example = torch.randn(2, 3, *SIZES[dims], generator=torch.Generator().manual_seed(seed))
    reference, log = reference_from_module(model, example, (DynamicAxis(1, 2, 8),))
    form = ("multiply", "where")[seed % 2]
    return reference, serialize(export_to_ir(reference, ExportOptions(mask_form=form), log))


def _other_gates(name: str, options: argparse.Namespace, failures: list[str]) -> dict:
    """Gates of no known SRU of one form: exports of three seeds, each on three inputs at every level of ORT."""
    row = dict.fromkeys(_COLUMNS.values(), 0) | {"variant": f"no SRU: {name}"}
    for seed in range(options.seed, options.seed + 3):
        model = gated(name, seed)
        reference, log = reference_from_module(model, torch.randn(2, 3, 16, 16, generator=torch.manual_seed(seed)))
        content = serialize(export_to_ir(reference, ExportOptions(), log))
        for level, scale in itertools.product(LEVELS, (0.1, 1.0, 3.0)):
            image = scale * torch.randn(2, 3, 16, 16, generator=torch.manual_seed(seed))
            judging = Judging(runtime=RuntimeOptions(threads=1, optimization=level))
            artifact = Artifact(onnx.load_model_from_string(content), "model.onnx", content)
            report = verify_onnx(reference, artifact, [Sample("d", {"input": image})], StageLog(), judging=judging)
            row["runs"] += 1
            row["passed"] += bool(report)
            for gate in report.other_gates:
                row["gates"] += gate.gates
                row["forced"] += gate.flips
                row["free"] += gate.free
                row["unexplained"] += gate.unexplained
                row["worst_layer"] = max(row["worst_layer"], gate.operand_ratio or 0.0)
            row["worst_replay"] = max(row["worst_replay"], *(o.replay_ratio for o in report.outputs))
            if not report:
                failures.append(f"{row['variant']}, seed {seed}, {level}, {scale}: {report.failures[0]}")
                print(failures[-1])
    return row


def _add(row: dict, report) -> None:
    row["runs"] += 1
    row["passed"] += bool(report)
    for sru in report.srus:
        row["gates"] += sru.free_running.gates
        row["forced"] += sru.teacher_forced.flips
        row["free"] += sru.free_running.flips
        row["unexplained"] += sru.teacher_forced.unexplained + sru.free_running.unexplained
    row["worst_replay"] = max(row["worst_replay"], *(o.replay_ratio for o in report.outputs))
    row["worst_layer"] = max(row["worst_layer"], *(la.relative_l2 / la.floor for la in report.layers))
