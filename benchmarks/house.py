"""How long a walk through the code is: lines, long parameter lists, and the files that a model and an artifact visit.

A file is visited when one of its functions is handed the thing itself: an ``nn.Module`` through ``deploy``, an ONNX
model (``ModelProto``, onnx-ir's ``Model``) or its bytes through ``verify``. The network is ScConv-ResNet-20. Counts, no
times: they are the same on every machine.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import onnx
import onnx_ir
import torch
from torch import nn

import scconv_deploy
from benchmarks.harness import Row, write
from scconv_deploy.model.spec import ModelSpec

PACKAGE = Path(scconv_deploy.__file__).parent
_MANY = 8
"""Parameters of a function that wants a record; ``self`` and ``cls`` are not counted."""
_COLUMNS = {"what": "what", "count": "count"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="name the files and functions too")


def run(options: argparse.Namespace) -> None:
    found = {"lines of Python": [str(n) for n in range(_lines())], f"functions of {_MANY} and more": _long_lists()}
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        net = scconv_deploy.load(ModelSpec("scconv_resnet20")).eval()
        image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(options.seed))
        deployed = _visited(lambda: scconv_deploy.deploy(net, image, bundle), (nn.Module,))
        kinds = (onnx.ModelProto, onnx.GraphProto, onnx_ir.Model)
        verified = _visited(lambda: scconv_deploy.verify(bundle, net, image), kinds)
    found["files that a model visits through deploy"], found["files that run in deploy"] = deployed
    found["files that an artifact visits through verify"], found["files that run in verify"] = verified
    if options.list:
        for what, names in list(found.items())[1:]:
            print(f"{what}:", *names, sep="\n  ")
    rows: list[Row] = [{"what": what, "count": len(names)} for what, names in found.items()]
    write(options.results, rows, _COLUMNS)


def _sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def _lines() -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in _sources())


def _long_lists() -> list[str]:
    """Functions that take many values; what typer fills from options is the command line's own list."""
    found = []
    for path in _sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and "commands" not in path.parts:
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                if len([name for name in names if name not in ("self", "cls")]) >= _MANY:
                    found.append(f"{path.relative_to(PACKAGE)}:{node.name}")
    return found


def _visited(work: Callable[[], object], kinds: tuple[type, ...]) -> tuple[list[str], list[str]]:
    """The package's files with a function that had one of these among its arguments, and those that ran at all."""
    files: set[str] = set()
    ran: set[str] = set()

    def on_call(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_filename in files or not code.co_filename.startswith(str(PACKAGE)):
            return
        ran.add(code.co_filename)
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        if any(isinstance(frame.f_locals.get(name), kinds) for name in names if name != "self"):
            files.add(code.co_filename)

    sys.setprofile(on_call)
    try:
        work()
    finally:
        sys.setprofile(None)
    handed, running = (sorted(str(Path(name).relative_to(PACKAGE)) for name in found) for found in (files, ran))
    return handed, running
