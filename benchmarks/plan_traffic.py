"""What TensorRT-RTX's compiled plan moves: ScConv-ResNet-50 in every form beside plain ResNet-50. Needs no GPU.

Bytes are those of each kernel's inputs and outputs, weights not counted, as the builder lists them
(``scconv_deploy.exporters.tensorrt.compiled_plan``). Each network is exported once in each precision through this
project's pipeline, and built with static shapes for each batch. ``--plugin FILE`` (or ``auto``) adds the fused SRU,
``--debug-tensors`` each form again with the ends of the SRUs marked (``build --debug-tensors srus``), ``--bodies``
other bodies of the same meaning, to tell what each part of the body saves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import onnx
import onnx.parser

from benchmarks.harness import Row, write
from scconv_deploy.graph.contract import FunctionKey
from scconv_deploy.graph.functions import function_text
from scconv_deploy.runtimes.tensorrt.engine import PlanLayer

_COLUMNS = {
    "network": "network",
    "CRUs": "cru",
    "SRUs": "srus",
    "precision": "precision",
    "batch": "batch",
    "marked": "marked",
    "MB": "megabytes",
    "times plain": "times_plain",
    "launches": "launches",
    "SRUs' MB": "sru_megabytes",
    "SRUs' launches": "sru_launches",
    "engine's bytes": "file_bytes",
    "build": "build_s",
}
_CHILD = """
import json, sys, time
from scconv_deploy.workflows.build import build_file
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.exporters.tensorrt.profiles import ShapeRange
from pathlib import Path
source, target, shape, plugin, debug, folder = sys.argv[1:]
options = BuildOptions("tensorrt-rtx", target, shapes=(ShapeRange.parse(shape),), debug_tensors=debug or None)
options = options.with_plugin(plugin or None)
first = build_file(Path(source), Path(folder) / "first.engine", options, cache=None, force=True)
start = time.perf_counter()
made = build_file(Path(source), Path(folder) / "again.engine", options, cache=None, force=True)
print(json.dumps({"seconds": time.perf_counter() - start, "manifest": made.engine.manifest.as_json()}))
"""
"""A process of its own for each: a plugin stays registered. The first build warms the library up."""


def _where(opset: int, *changes: tuple[str, str]) -> str:
    """The body for TensorRT's compilers, parts of its text replaced."""
    text = function_text(FunctionKey("SRU", False, "where", opset))
    for old, new in changes:
        if text.count(old) != 1:
            raise ValueError(f"{old!r} is not once in the body")
        text = text.replace(old, new)
    return text


BODIES: dict[str, Callable[[int], str]] = {
    "body for ONNX Runtime": lambda opset: function_text(FunctionKey("SRU", False, "multiply", opset)),
    "one conversion to float32": lambda opset: _where(
        opset, ("sru__x_measured = Cast <to = 1> (sru__x)", "sru__x_measured = Identity (sru__xf)")
    ),
    "data in x's type": lambda opset: _where(
        opset,
        ("CastLike (sru__closed_f, sru__xf)", "CastLike (sru__closed_f, sru__x)"),
        ("Where (sru__open, sru__xf, sru__closed)", "Where (sru__open, sru__x, sru__closed)"),
        ("Sub (sru__xf, sru__x1)", "Sub (sru__x, sru__x1)"),
    ),
    "a row a piece": lambda opset: _where(opset, ("value_ints = [16384]", "value_ints = [1]")),
    "a group a piece": lambda opset: function_text(FunctionKey("SRU", True, "where", opset)),
}
"""In the place of the body for TensorRT's compilers: each computes the paper's SRU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--network", choices=("resnet50", "resnet20"), default="resnet50", help="resnet20 is quick")
    parser.add_argument("--target", default="sm89")
    parser.add_argument("--plugin", default="", metavar="FILE|auto", help="also with the fused SRU")
    parser.add_argument("--debug-tensors", action="store_true", help="also with the ends of the SRUs marked")
    parser.add_argument("--bodies", action="store_true", help="also with other bodies of the same meaning")
    parser.add_argument("--cru", default="as-is,merged", help="forms of the CRU, comma-separated (export --cru)")
    parser.add_argument("--precisions", default="fp32,fp16")
    parser.add_argument("--batches", default="1,8")


def run(options: argparse.Namespace) -> None:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for precision in options.precisions.split(","):
            plain, ours = options.network, f"scconv_{options.network}"
            files = {(plain, ""): _exported(plain, "as-is", precision, Path(folder), options.seed)}
            for cru in options.cru.split(","):
                files[ours, cru] = _exported(ours, cru, precision, Path(folder), options.seed)
            for batch in map(int, options.batches.split(",")):
                rows += _of_batch(files, precision, batch, options, Path(folder))
    library = version("tensorrt-rtx")
    write(options.results, rows, _COLUMNS, target=options.target, seed=options.seed, tensorrt_rtx=library)


def _exported(name: str, cru: str, precision: str, folder: Path, seed: int) -> Path:
    path = folder / f"{name}-{cru}-{precision}.onnx"
    command = ("export", name, "-o", path, "--batch", "1:8:32", "--precision", precision, "--mask-form", "where")
    _run("-m", "scconv_deploy", *command, "--cru", cru, "--seed", seed, "--quiet")
    return path


def _of_batch(
    files: dict[tuple[str, str], Path], precision: str, batch: int, options: argparse.Namespace, folder: Path
) -> list[Row]:
    (plain, _), *ours = files
    built = [(files[plain, ""], plain, "", "", "none", "")]
    for name, cru in ours:
        file = files[name, cru]
        for form, plugin in {"expanded": "", **({"plugin": options.plugin} if options.plugin else {})}.items():
            for debug in ("", "srus") if options.debug_tensors else ("",):
                built.append((file, name, cru, plugin, form, debug))
        if options.bodies:
            built += [(_with_body(file, body, folder), name, cru, "", f"expanded, {body}", "") for body in BODIES]
    side = 224 if options.network == "resnet50" else 32
    rows: list[Row] = []
    for file, name, cru, plugin, form, debug in built:
        shape = f"image:{batch}x3x{side}x{side}"
        made = _json(_run("-c", _CHILD, file, options.target, shape, plugin, debug, folder))
        plan, marked = made["manifest"]["plan"], made["manifest"]["debug_tensors"]
        srus = [layer for layer in (PlanLayer(**found) for found in plan["layers"]) if layer.of_sru]
        row = {
            "network": name, "cru": cru, "srus": form, "precision": precision, "batch": batch,
            "marked": len({tensor["name"] for tensor in marked}),
            "megabytes": plan["bytes_moved"] / 1e6, "launches": plan["launches"],
            "sru_megabytes": sum(layer.bytes_moved or 0 for layer in srus) / 1e6, "sru_launches": len(srus),
            "file_bytes": made["manifest"]["file_bytes"], "build_s": made["seconds"],
        }  # fmt: skip
        rows.append(row | {"times_plain": row["megabytes"] / (rows[0] if rows else row)["megabytes"]})
    return rows


def _with_body(file: Path, body: str, folder: Path) -> Path:
    model = onnx.load(file)
    (function,) = model.functions
    function.CopyFrom(onnx.parser.parse_function(BODIES[body](function.opset_import[0].version)))
    path = folder / f"{file.stem}-{list(BODIES).index(body)}.onnx"
    onnx.save(model, path)
    return path


def _run(*arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def _json(text: str) -> Row:
    found: Row = json.loads(text.strip().splitlines()[-1])
    return found
