"""Seconds to build a TensorRT-RTX engine, ScConv network beside the plain one; no GPU is needed, no cache is used.

Both are exported first, through our pipeline, with the mask form that TensorRT backends get. The library keeps
thread pools and compiled pieces between builds in one process, which hits both alike.

``--plugin`` builds the ScConv network with the fused SRU in place of the expanded one: a plugin stays registered in the
process. ``--bodies`` also builds the ScConv network with less in its SRUs, to tell what of the time is whose. None of
them is an SRU: they are there to be timed.
"""

from __future__ import annotations

import argparse
import copy
from importlib.metadata import version

import onnx
import onnx.parser

from benchmarks.harness import Row, interleave, write
from scconv_deploy.exporters.tensorrt.builder import Plan, build_plan, check_options
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.exporters.tensorrt.plugin_choice import with_plugin
from scconv_deploy.exporters.tensorrt.profiles import resolve_profiles
from scconv_deploy.graph.file import serialize
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.prepare import reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.runtimes.tensorrt.versions import load_module
from scconv_deploy.workflows.export import ExportOptions, export_to_ir

_CROSS = """
    halves = Constant <value_ints = [0, 2, -1]> ()
    other = Constant <value_ints = [1, 0]> ()
    shape = Shape (x)
    shut = Sub (x, x1)
    split = Reshape (shut, halves)
    swapped = Gather <axis = 1> (split, other)
    crossed = Reshape (swapped, shape)
    y = Add (x1, crossed)
"""
_SELECT = """
    zero = Constant <value_float = 0.0> ()
    x1 = Where (open, x, zero)
"""
BODIES = {
    "no SRU": "    y = Identity (x)",
    "threshold 0, no statistics": "    nought = Constant <value_float = 0.0> ()\n    open = GreaterOrEqual (x, nought)"
    + _SELECT
    + _CROSS,
    "fewest statistics": """
    count = Constant <value_int: int = @num_groups> ()
    front = Constant <value_ints = [0]> ()
    back = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    groups = Reshape (count, one)
    grouped = Concat <axis = 0> (front, groups, back)
    per_channel = Concat <axis = 0> (one, groups, back)
    as_channels = Constant <value_ints = [0, -1, 1, 1]> ()
    size = Shape (x)
    x_grouped = Reshape (x, grouped)
    mean = ReduceMean (x_grouped, two)
    centred_grouped = Sub (x_grouped, mean)
    centred = Reshape (centred_grouped, size)
    squares = ReduceSumSquare (centred_grouped, two)
    cut_c = Reshape (cut, per_channel)
    product = Mul (squares, cut_c)
    threshold = Reshape (product, as_channels)
    open = GreaterOrEqual (centred, threshold)
"""
    + _SELECT
    + _CROSS,
}
"""In the place of the paper's SRU: x, cut and sign give y."""

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

    def __init__(self, name: str, seed: int, target: str, plugin: str = "") -> None:
        batch = DynamicAxis(1, 8, 32)
        reference, log = reference_from_spec(ModelSpec(name, dynamic=(batch,), seed=seed))
        options = ExportOptions(backends=("onnx", "tensorrt-rtx"))
        self.model = onnx.load_model_from_string(serialize(export_to_ir(reference, options, log)))
        wanted = BuildOptions("tensorrt-rtx", target, axes=(batch,), require_plugin=bool(plugin))
        (self.options,) = with_plugin([wanted.with_plugin(plugin or None)], lambda text: None)
        self.module = load_module("tensorrt-rtx")
        check_options(self.module, self.options)
        self.plan: Plan | None = None

    def with_body(self, body: str) -> _Build:
        """The same network with another meaning of its SRUs."""
        (function,) = self.model.functions
        formal = [name.removeprefix("sru__") for name in function.input]
        opset = function.opset_import[0].version
        other = onnx.parser.parse_function(
            f'<domain: "{function.domain}", opset_import: ["" : {opset}]>\n'
            f"{function.name} <{', '.join(function.attribute)}> ({', '.join(formal)}) => (y)\n{{\n{body}\n}}"
        )
        changed = copy.copy(self)
        changed.model = onnx.ModelProto()
        changed.model.CopyFrom(self.model)
        changed.model.functions[0].CopyFrom(other)
        return changed

    def __call__(self) -> None:
        source = OnnxSource(self.model)
        profiles = resolve_profiles(source.facts.shapes, (), self.options.axes)
        self.plan = build_plan(self.module, source, self.options, profiles)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=("resnet50", "resnet20"), default="resnet50", help="resnet20 is quick")
    parser.add_argument("--target", default="sm89,sm120")
    parser.add_argument("--plugin", default="", metavar="FILE|auto", help="the fused SRU, not the expanded one")
    parser.add_argument("--bodies", action="store_true", help="also less in the SRUs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)


def run(options: argparse.Namespace) -> None:
    names = (options.network, f"scconv_{options.network}")
    builds = {names[0]: _Build(names[0], options.seed, options.target)}
    builds[names[1]] = _Build(names[1], options.seed, options.target, options.plugin)
    if options.bodies:
        network = builds[names[1]]
        builds |= {f"{names[1]}, {what}": network.with_body(body) for what, body in BODIES.items()}
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
