"""Seconds that ``rewrite`` takes on naive TorchScript exports, and how they grow with the number of nodes.

The networks are chains of ScConvs of several depths as a user writes them, and with ``--network resnet50`` the
ScConv-ResNet-50, whose gamma sums unroll into twelve thousand nodes. Exporting is not counted.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
from pathlib import Path

import onnx
import torch

from benchmarks import subjects
from benchmarks.harness import Row, interleave, write
from scconv_deploy.workflows.rewrite import RewriteOptions, RewriteResult, rewrite_onnx
from scconv_deploy.zoo import MODELS
from tests.wild import OriginalScConv

_COLUMNS = {
    "variant": "variant",
    "nodes": "nodes",
    "SRUs": "srus",
    "median": "median_s",
    "min": "min_s",
    "p25": "p25_s",
    "p75": "p75_s",
    "us per node": "us_per_node",
    "stages": "stages",
}


class _Rewrite:
    """One file, rewritten at every call; keeps the last result."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self.nodes = len(onnx.load(source).graph.node)
        self.result: RewriteResult | None = None

    def __call__(self) -> None:
        self.result = rewrite_onnx(
            self.source, self.source.with_suffix(".out.onnx"), options=RewriteOptions(), force=True
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=("resnet50", "depths"), default="depths", help="depths is quick")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warmup", type=int, default=1)


def run(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rewrites = {name: _Rewrite(path) for name, path in _files(options, Path(folder)).items()}
        timing = interleave(rewrites, options.rounds, options.warmup)
        rows: list[Row] = []
        for name, rewrite in rewrites.items():
            result = rewrite.result
            if result is None or result.outcome != "rewritten":
                raise RuntimeError(f"{name}: {None if result is None else result.near_misses}")
            stages = ", ".join(f"{s.name} {s.seconds:.2f}" for s in result.stages)
            median = statistics.median(timing.seconds[name])
            facts = {"nodes": rewrite.nodes, "srus": len(result.sites), "us_per_node": 1e6 * median / rewrite.nodes}
            rows.append(timing.row(name, next(iter(rewrites))) | facts | {"stages": stages})
        write(options.results, rows, _COLUMNS, seed=options.seed, warmup=options.warmup)


def _files(options: argparse.Namespace, folder: Path) -> dict[str, Path]:
    if options.network == "resnet50":
        plain, _ = subjects.plain_network("resnet50", options.seed)
        return {"scconv_resnet50": _export(plain, MODELS["resnet50"].input_shape, folder / "resnet50.onnx")}
    files = {}
    for blocks in (4, 8, 16, 32):
        torch.manual_seed(options.seed)
        net = torch.nn.Sequential(*(OriginalScConv(32, 16) for _ in range(blocks))).eval()
        files[f"{blocks} ScConvs"] = _export(net, (1, 32, 16, 16), folder / f"{blocks}.onnx")
    return files


def _export(model: torch.nn.Module, shape: tuple[int, ...], path: Path) -> Path:
    buffer = io.BytesIO()
    with subjects._quiet():
        torch.onnx.export(model, (subjects.noise(shape, 0),), buffer, dynamo=False, opset_version=18)
    path.write_bytes(buffer.getvalue())
    return path
