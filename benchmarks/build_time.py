"""Seconds to build a TensorRT-RTX engine, ScConv network beside the plain one; no GPU is needed, no cache is used.

Both are exported first, through our pipeline, with the mask form that TensorRT backends get. The library keeps
thread pools and compiled pieces between builds in one process, which hits both alike.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version

import onnx

from benchmarks.harness import Row, interleave, write
from scconv_deploy.exporters.build_options import BuildOptions
from scconv_deploy.exporters.onnx import serialize
from scconv_deploy.exporters.profiles import resolve_profiles
from scconv_deploy.exporters.tensorrt import Plan, build_plan, check_options
from scconv_deploy.exporters.tensorrt_versions import load_module
from scconv_deploy.pipeline import ExportOptions, export_to_ir, reference_from_spec
from scconv_deploy.report.records import StageLog
from scconv_deploy.spec import DynamicAxis, ModelSpec

_COLUMNS = {
    "variant": "variant",
    "median": "median_s",
    "min": "min_s",
    "p25": "p25_s",
    "p75": "p75_s",
    "rounds": "rounds",
    "times plain": "times_baseline",
    "layers": "layers",
    "plan bytes": "plan_bytes",
}


class _Build:
    """One variant: builds, and keeps the last plan."""

    def __init__(self, name: str, seed: int, target: str) -> None:
        batch = DynamicAxis(1, 8, 32)
        log = StageLog()
        reference = reference_from_spec(ModelSpec(name, dynamic=(batch,), seed=seed), log)
        options = ExportOptions(backends=("onnx", "tensorrt-rtx"))
        self.model = onnx.load_model_from_string(serialize(export_to_ir(reference, options, log)))
        self.options = BuildOptions("tensorrt-rtx", target, axes=(batch,))
        self.module = load_module("tensorrt-rtx")
        check_options(self.module, self.options)
        self.plan: Plan | None = None

    def __call__(self) -> None:
        profiles = resolve_profiles(self.model, (), self.options.axes)
        self.plan = build_plan(self.module, self.model, self.options, profiles)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=("resnet50", "resnet20"), default="resnet50", help="resnet20 is quick")
    parser.add_argument("--target", default="sm89,sm120")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)


def run(options: argparse.Namespace) -> None:
    names = (options.network, f"scconv_{options.network}")
    builds = {name: _Build(name, options.seed, options.target) for name in names}
    timing = interleave(builds, options.rounds, options.warmup)
    rows: list[Row] = []
    for name, build in builds.items():
        row = timing.row(name, options.network)
        row["times_baseline"] = 1 / row["speedup"]
        if build.plan is not None:
            row |= {"layers": len(build.plan.layers), "plan_bytes": len(build.plan.data)}
        rows.append(row)
    library = version("tensorrt-rtx")
    write(options.results, rows, _COLUMNS, target=options.target, seed=options.seed, tensorrt_rtx=library)
