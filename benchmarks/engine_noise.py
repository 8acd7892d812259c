"""What the end-to-end limit of an engine lets pass and what it catches: healthy artifacts, and faults that an engine
could have, as multiples of the noise that the reference allows (``engine_multiple`` of them is the limit).

No engine runs here: ONNX Runtime, at each of its optimisation levels, runs the same ONNX files with an engine's
manifest, and the verdict is the one that engines get. With ``--inside`` they show the ends of their SRUs, as
``build --debug-tensors srus`` makes them. A fault that the library would make wherever it meets an SRU is
in the SRUs alone too, the others are in the whole artifact only.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from benchmarks.engine_faults import FAULTS, Fault
from benchmarks.harness import Row, write
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.graph.file import serialize
from scconv_deploy.graph.types import Precision
from scconv_deploy.model.prepare import Reference, reference_from_module, reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records import tolerances
from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.onnxruntime import Optimization, RuntimeOptions
from scconv_deploy.verification import sru_models
from scconv_deploy.verification.engine.verdict import judge_engine, no_models
from scconv_deploy.verification.reference.pytorch import TorchReference
from scconv_deploy.verification.samples import noise_samples
from scconv_deploy.workflows.export import ExportOptions, export_to_ir, in_precision
from scconv_deploy.zoo.cifar_resnet import CifarResNet
from scconv_deploy.zoo.layers import initialize, scconv3x3
from tests.mutations import two_heads
from tests.verification.engine_cases import copy_of, ends_of, engine_of, ort_builder, watched_opener

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "bf16")
LEVELS: tuple[Optimization, ...] = ("none", "basic", "extended", "all")
INSIDE = {"gates inside", "values inside", "segments"}
TWO_HEADS = "with two heads"
_COLUMNS = {
    "artifact": "artifact",
    "precision": "precision",
    "runs": "runs",
    "least": "least_ratio",
    "median": "median_ratio",
    "largest": "largest_ratio",
    "largest segment": "largest_segment",
    "limit": "limit",
    "runs that fail end to end": "end_to_end",
    "runs that fail inside": "inside",
    "runs that fail": "failed",
    "checks that fail": "checks",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3, help="of each network: its weights and its inputs (default 3)")
    parser.add_argument("--blocks", type=int, default=3, help="a stage, of the network with faults: 3 is ResNet-20")
    parser.add_argument("--few", action="store_true", help="the network with faults alone")
    parser.add_argument("--inside", action="store_true", help="of engines with debug tensors: their inside too")
    parser.add_argument("--zoo", metavar="NAME", help="a network of the zoo instead of all these, healthy")


def run(options: argparse.Namespace) -> None:
    seeds = range(options.seed, options.seed + options.seeds)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, references in _networks(seeds, options).items():
            subjects = [_Subject(reference, Path(folder), options.inside) for reference in references]
            rows += [_row(f"healthy {name}", p, _healthy(subjects, p)) for p in PRECISIONS]
            if name.endswith(TWO_HEADS):
                for fault, precision in itertools.product(FAULTS, PRECISIONS):
                    if precision in FAULTS[fault].precisions:
                        judged = [s.judge(precision, FAULTS[fault]) for s in subjects]
                        rows.append(_row(fault, precision, judged))
            write(options.results, rows, _COLUMNS, table=False)
    write(options.results, rows, _COLUMNS, summary=_summary(rows), seeds=list(seeds))


def _networks(seeds: Iterable[int], options: argparse.Namespace) -> dict[str, Iterator[Reference]]:
    """References by network, one a seed."""
    if options.zoo:
        return {options.zoo: map(partial(_zoo, options.zoo), seeds)}
    depth = 6 * options.blocks + 2
    found: dict[str, Iterator[Reference]] = {
        f"ScConv-ResNet-{depth} {TWO_HEADS}": (_given(two_heads(options.blocks, 32, seed), seed) for seed in seeds)
    }
    if not options.few:
        found |= {f"small net of {name}": map(partial(_small, name), seeds) for name in VARIANTS}
        found["scconv_resnet20"] = map(partial(_zoo, "scconv_resnet20"), seeds)
    return found


def _small(variant: str, seed: int) -> Reference:
    torch.manual_seed(seed)
    model = initialize(CifarResNet(1, scconv3x3(variant=variant)), (8, 3, 32, 32)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("gn.beta", "SRU.gn.bias")) and seed % 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return _given(model, seed)


def _given(model: torch.nn.Module, seed: int) -> Reference:
    return reference_from_module(model, torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))[0]


def _zoo(name: str, seed: int) -> Reference:
    return reference_from_spec(ModelSpec(name, seed=seed))[0]


class _Remembered(TorchReference):
    """A reference that runs and measures each sample once, though many artifacts are held against it."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(reference)
        self._runs: dict[str, Any] = {}
        self._free_noise: dict[tuple[str, str], dict[str, float]] = {}

    def run(self, sample: Any) -> Any:
        if sample.name not in self._runs:
            self._runs[sample.name] = super().run(sample)
        return self._runs[sample.name]

    def free_noise(self, run: Any, rounding: str) -> dict[str, float]:
        if (run.sample, rounding) not in self._free_noise:
            self._free_noise[run.sample, rounding] = super().free_noise(run, rounding)
        return self._free_noise[run.sample, rounding]


class _Subject:
    """One network of one seed, its artifacts and its reference."""

    def __init__(self, reference: Reference, folder: Path, inside: bool = False) -> None:
        self.reference, self._folder, self._inside = reference, folder, inside
        self._source = _Remembered(reference)
        self._exported: dict[int, ir.Model] = {}
        self._models: dict[str, onnx.ModelProto] = {}

    def model(self, precision: Precision) -> onnx.ModelProto:
        """As a builder of engines gets it."""
        if precision not in self._models:
            options = ExportOptions(backends=("onnx", "tensorrt"), precision=precision)
            opset = options.resolved_opset
            if opset not in self._exported:
                self._exported[opset] = export_to_ir(self.reference, options, StageLog())
            content = serialize(in_precision(self._exported[opset], options, StageLog()))
            self._models[precision] = onnx.load_model_from_string(content)
        return self._models[precision]

    def judge(self, precision: Precision, fault: Fault | None = None, level: Optimization = "all") -> ParityReport:
        """An engine's verdict; of the SRUs alone too where there is a fault."""
        model = self.model(precision)
        built = copy_of(model)
        if fault is not None:
            fault.damage(built, self.reference.model)
        alone = fault.damage if fault is not None and fault.everywhere else lambda model, torch_model: None
        return judge_engine(
            self._source, engine_of(built, self._folder, debug_tensors=ends_of(built) if self._inside else ()),
            noise_samples(self.reference.signature, 0), StageLog(),
            sru_models=no_models if fault is None else lambda site, shape: sru_models.of_artifact(model, site, shape),
            opener=lambda engine, plugin: watched_opener(engine, plugin, options=RuntimeOptions(optimization=level)),
            build_sru=ort_builder(lambda lone: alone(lone, self.reference.model)),
        )  # fmt: skip


def _healthy(subjects: Iterable[_Subject], precision: Precision) -> list[ParityReport]:
    return [subject.judge(precision, level=level) for subject in subjects for level in LEVELS]


def _row(artifact: str, precision: Precision, reports: Iterable[ParityReport]) -> Row:
    """Of each run its output with the largest ratio; none where no output could be compared."""
    ratios: list[float] = []
    segments: list[float] = []
    failed: list[set[str]] = []
    for report in reports:
        checks = [check for link in report.links for check in link.checks]
        for name, kept in (("end to end", ratios), ("segments", segments)):
            found = [q.value for c in checks for q in c.quantities if c.name == name and math.isfinite(q.value)]
            kept += [max(found)] if found else []
        failed.append({check.name for check in checks if check.status == "failed"})
    return {
        "artifact": artifact,
        "precision": precision,
        "runs": len(failed),
        "least_ratio": min(ratios, default=None),
        "median_ratio": statistics.median(ratios) if ratios else None,
        "largest_ratio": max(ratios, default=None),
        "largest_segment": max(segments, default=None),
        "limit": tolerances.ALL["engine_multiple"].value,
        "end_to_end": sum("end to end" in names for names in failed),
        "inside": sum(bool(names & INSIDE) for names in failed),
        "failed": sum(map(bool, failed)),
        "checks": ", ".join(sorted(set().union(*failed))),
    }


def _summary(rows: Iterable[Row]) -> Mapping[str, Any]:
    """By precision: the largest ratio of a healthy run, and the least of a fault that fails end to end in every run."""
    found: dict[str, dict[str, float]] = {}
    for precision in PRECISIONS:
        mine = [row for row in rows if row["precision"] == precision and row["largest_ratio"] is not None]
        healthy = [row["largest_ratio"] for row in mine if row["artifact"].startswith("healthy")]
        caught = [row["least_ratio"] for row in mine if row["end_to_end"] == row["runs"]]
        found[precision] = {"largest_healthy": max(healthy)}
        if caught:
            found[precision]["least_of_faults_always_caught"] = min(caught)
    return {"by_precision": found}
