"""Seconds from a name to a checked ONNX model, ScConv network beside the plain one, both through our pipeline.

Imports are paid in the warm-up rounds. ``--naive`` adds one torch.onnx.export of the plain user code, whose
``sum(gamma)`` unrolls into one node per channel: minutes for a ResNet-50.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks import subjects
from benchmarks.harness import Row, Timing, interleave, write
from scconv_deploy.model.prepare import reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records.stage import StageLog
from scconv_deploy.workflows.export import ExportOptions, export_to_ir
from scconv_deploy.zoo import MODELS

_COLUMNS = {
    "variant": "variant",
    "median": "median_s",
    "min": "min_s",
    "p25": "p25_s",
    "p75": "p75_s",
    "rounds": "rounds",
    "times plain": "times_baseline",
    "nodes": "nodes",
    "stages": "stages",
}


class _Export:
    """One variant: exports, and keeps the stages' seconds and the number of nodes."""

    def __init__(self, name: str, seed: int) -> None:
        self.spec, self.nodes = ModelSpec(name, seed=seed), 0
        self.logs: list[StageLog] = []

    def __call__(self) -> None:
        reference, log = reference_from_spec(self.spec)
        self.nodes = len(export_to_ir(reference, ExportOptions(), log).graph)
        self.logs.append(log)

    def stages(self, rounds: int) -> str:
        """Median seconds of each stage over the counted rounds."""
        by_name = zip(*(log.records for log in self.logs[-rounds:]), strict=True)
        return ", ".join(f"{r[0].name} {statistics.median(s.seconds for s in r):.2f}" for r in by_name)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=("resnet50", "resnet20"), default="resnet50", help="resnet20 is quick")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--naive", action="store_true", help="also the naive export, once")


def run(options: argparse.Namespace) -> None:
    exports = {name: _Export(name, options.seed) for name in (options.network, f"scconv_{options.network}")}
    timing = interleave(exports, options.rounds, options.warmup)
    rows: list[Row] = []
    for name, export in exports.items():
        facts = {"nodes": export.nodes, "stages": export.stages(options.rounds)}
        rows.append(timing.row(name, options.network) | facts)
    shape = MODELS[options.network].input_shape
    if options.naive:
        rows.append(_naive(options, timing, shape))
    for row in rows:
        row["times_baseline"] = 1 / row["speedup"]
    write(options.results, rows, _COLUMNS, shape=shape, seed=options.seed, warmup=options.warmup)


def _naive(options: argparse.Namespace, timing: Timing, shape: tuple[int, ...]) -> Row:
    """One round is all the patience there is: its ratio is against the baseline's median."""
    plain, _ = subjects.plain_network(options.network, options.seed)
    _, export = subjects.naive_onnx(plain, subjects.noise(shape, options.seed))
    baseline = statistics.median(timing.seconds[options.network])
    name = f"naive torch.onnx.export, scconv_{options.network}"
    once = Timing({name: [export.seconds], options.network: [baseline]})
    return once.row(name, options.network) | {"nodes": export.nodes}
