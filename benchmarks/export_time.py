"""Processor time from a model to a checked ONNX model or a verified bundle, ScConv network beside the plain one.

Seconds of the processor, not of the clock, with one torch thread and with two: threads that spin count, other load
does not. Costs are also given in forward passes of the model with as many threads. Imports are paid in the warm-up
round. ``--naive`` adds one torch.onnx.export of the plain user code, whose ``sum(gamma)`` unrolls into one node per
channel: minutes for a ResNet-50.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import subjects
from benchmarks.gated_networks import NETWORKS, network
from benchmarks.harness import Row, Timing, interleave, write
from scconv_deploy.model.prepare import reference_from_module
from scconv_deploy.workflows.deploy import deploy
from scconv_deploy.workflows.export import ExportOptions, export_to_ir

_FORWARDS = 5
_COLUMNS = {
    "variant": "variant",
    "threads": "torch_threads",
    "median": "median_s",
    "min": "min_s",
    "times plain": "times_baseline",
    "forward pass": "forward_s",
    "all, in passes": "in_forwards",
    "recognition": "recognition_s",
    "recognition, in passes": "recognition_in_forwards",
    "nodes": "nodes",
    "rounds": "rounds",
}


class _Export:
    """One variant: exports or deploys on some torch threads, and keeps what parts of it took."""

    def __init__(self, name: str, gated: bool, threads: int, whole: bool, seed: int) -> None:
        self.name, self.threads, self._whole = f"{'scconv_' if gated else ''}{name}", threads, whole
        self._model, self._x = network(name, gated, seed)
        self.nodes = 0
        self.forwards: list[float] = []
        self.recognitions: list[float] = []

    def __call__(self) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            self._deploy() if self._whole else self._export()
        finally:
            torch.set_num_threads(before)

    def _export(self) -> None:
        start = time.process_time()
        reference, log = reference_from_module(self._model, (self._x,))
        self.recognitions.append(time.process_time() - start)
        self.nodes = len(export_to_ir(reference, ExportOptions(), log).graph)

    def _deploy(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if not deploy(self._model, (self._x,), Path(folder) / "out"):
                raise RuntimeError(f"{self.name} failed its own verification")

    def forward_s(self) -> float:
        """Median processor time of a forward pass on this variant's threads."""
        before, seconds = torch.get_num_threads(), []
        torch.set_num_threads(self.threads)
        with torch.no_grad():
            for _ in range(_FORWARDS):
                start = time.process_time()
                self._model(self._x)
                seconds.append(time.process_time() - start)
        torch.set_num_threads(before)
        return statistics.median(seconds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=("resnet50", "resnet20", *NETWORKS), default="resnet50")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of torch (default 1 2)")
    parser.add_argument("--deploy", action="store_true", help="the whole of deploy, verification included")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--naive", action="store_true", help="also the naive export, once (of the zoo's networks)")


def run(options: argparse.Namespace) -> None:
    exports = {
        f"{one.name}, {threads}": one
        for threads in options.threads
        for gated in (False, True)
        for one in [_Export(options.network, gated, threads, options.deploy, options.seed)]
    }
    reference, log = reference_from_module(*network("resnet20", True, options.seed))
    export_to_ir(reference, ExportOptions(), log)  # pays the imports
    timing = interleave(exports, options.rounds, 0, time.process_time, patience=1)
    rows: list[Row] = []
    for name, export in exports.items():
        row = timing.row(name, f"{options.network}, {export.threads}")
        forward = export.forward_s()
        row |= {"torch_threads": export.threads, "nodes": export.nodes, "forward_s": forward}
        row["in_forwards"] = row["median_s"] / forward
        if export.recognitions:
            row["recognition_s"] = statistics.median(export.recognitions[-options.rounds :])
            row["recognition_in_forwards"] = row["recognition_s"] / forward
        rows.append(row)
    shape = tuple(network(options.network, False, options.seed)[1].shape)
    if options.naive:
        rows.append(_naive(options, timing, shape))
    for row in rows:
        row["times_baseline"] = 1 / row["speedup"]
    write(options.results, rows, _COLUMNS, shape=shape, seed=options.seed, clock="process_time")


def _naive(options: argparse.Namespace, timing: Timing, shape: tuple[int, ...]) -> Row:
    """One round is all the patience there is: its ratio is against the baseline's median."""
    plain, _ = subjects.plain_network(options.network, options.seed)
    _, export = subjects.naive_onnx(plain, subjects.noise(shape, options.seed))
    first = f"{options.network}, {options.threads[0]}"
    baseline = statistics.median(timing.seconds[first])
    name = f"naive torch.onnx.export, scconv_{options.network}"
    once = Timing({name: [export.seconds], first: [baseline]})
    return once.row(name, first) | {"nodes": export.nodes}
