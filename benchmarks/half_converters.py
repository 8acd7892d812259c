"""Converters to half precision, ours and others', behind one call; each is given a file as its users would give it."""

from __future__ import annotations

import importlib
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import onnx
import onnx.inliner
import onnx_ir as ir

from scconv_deploy.graph.contract import DOMAIN
from scconv_deploy.graph.types import HalfPrecision
from scconv_deploy.precision.half import HalfOptions, to_half

Source = Literal["user's export", "ours", "ours, inlined"]
"""What is converted: torch.onnx.export of the user's code, our file, or our file with its functions inlined."""

_BODY = "scconv_body_"
"""Prefix of the names of nodes that came out of a function, so that a pattern can name them."""
_NVIDIA = "NVIDIA AutoCast"


class Unavailable(Exception):
    """The tool is not installed."""


@dataclass(frozen=True)
class Converter:
    """A tool, what it is given, and with which options."""

    tool: str
    source: Source
    precision: HalfPrecision
    convert: Callable[[onnx.ModelProto], onnx.ModelProto]
    blocked: bool = False

    @property
    def name(self) -> str:
        return f"{self.tool}, SRUs blocked" if self.blocked else self.tool


def converters(autocast: str) -> list[Converter]:
    """All of them.

    Args:
        autocast: a Python interpreter with nvidia-modelopt; "" where there is none.
    """
    found = [Converter("ours", "ours", precision, _ours(precision)) for precision in ("fp16", "bf16")]
    for tool, module in (
        ("onnxruntime.transformers", "onnxruntime.transformers.float16"),
        ("onnxconverter-common", "onnxconverter_common.float16"),
    ):
        for source in ("user's export", "ours", "ours, inlined"):
            found.append(Converter(tool, source, "fp16", _float16(module, blocked=False)))
        found.append(Converter(tool, "ours", "fp16", _float16(module, blocked=True), blocked=True))
    for precision in ("fp16", "bf16"):
        for source, blocked in (("user's export", False), ("ours, inlined", False), ("ours, inlined", True)):
            found.append(Converter(_NVIDIA, source, precision, _autocast(autocast, precision, blocked), blocked))
    return found


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without functions; the nodes that came out of them are named."""
    kept = {node.name for node in model.graph.node if node.domain != DOMAIN}
    copy = onnx.inliner.inline_local_functions(model)
    for index, node in enumerate(copy.graph.node):
        if node.name not in kept:
            node.name = f"{_BODY}{index}"
    return copy


def tool_versions(autocast: str) -> dict[str, str]:
    """Of the tools that are not this package's own dependencies."""
    found = {}
    for name in ("onnxconverter-common",):
        try:
            found[name] = version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    code = "from importlib.metadata import version as v; print(*(f'{n} {v(n)}' for n in ('nvidia-modelopt', 'onnx')))"
    ran = subprocess.run([autocast, "-c", code], capture_output=True, text=True, check=False) if autocast else None
    found["nvidia-modelopt"] = ran.stdout.strip() if ran is not None and ran.returncode == 0 else "not installed"
    return found


def _ours(precision: HalfPrecision) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    return lambda model: ir.to_proto(to_half(ir.from_proto(model), HalfOptions(precision)).model)


def _float16(module: str, blocked: bool) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    def convert(model: onnx.ModelProto) -> onnx.ModelProto:
        try:
            tool = importlib.import_module(module)
        except ImportError as error:
            raise Unavailable(f"{module} is not installed") from error
        operators = [*tool.DEFAULT_OP_BLOCK_LIST, *(("SRU", "SRUNorm", "SRUSoft") if blocked else ())]
        return tool.convert_float_to_float16(model, keep_io_types=True, op_block_list=operators)

    return convert


def _autocast(python: str, precision: HalfPrecision, blocked: bool) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """In a process of its own, for it pins other versions of onnx and onnxruntime."""

    def convert(model: onnx.ModelProto) -> onnx.ModelProto:
        if not python:
            raise Unavailable("AUTOCAST_PYTHON names no interpreter")
        with tempfile.TemporaryDirectory() as folder:
            source, output = Path(folder) / "model.onnx", Path(folder) / "half.onnx"
            onnx.save(model, source)
            command = [python, "-m", "modelopt.onnx.autocast", "--onnx_path", str(source), "--output_path", str(output)]
            command += ["--low_precision_type", precision, "--keep_io_types"]
            command += ["--nodes_to_exclude", f"{_BODY}.*"] if blocked else []
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            if not output.exists():
                raise RuntimeError((ran.stdout + ran.stderr).strip().splitlines()[-1])
            return onnx.load(output)

    return convert
