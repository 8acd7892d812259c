"""Naive exports of a ScConv ResNet-20 in every form that people have: how many SRUs ``rewrite --reference`` fuses.

Three variants of the SRU as their authors write them, both exporters of torch, static and dynamic batch, the file as
exported and after onnxsim or onnxslim; parameters as training leaves them, or with beta = 0 as in a network that was
not trained. With ``--opsets``, instead, one form at every opset. Each file is judged against PyTorch.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxsim
import torch
from torch import nn

from benchmarks import subjects
from benchmarks.harness import Row, write
from scconv_deploy.errors import ModelError
from scconv_deploy.model.inputs import DynamicAxis, InputSpec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.workflows.rewrite import RewriteOptions, RewriteResult, rewrite_onnx
from scconv_deploy.zoo import MODELS
from tests import wild

SRUS = 9
VARIANTS: dict[str, Callable[[int], nn.Module]] = {
    "groupbn-hard": lambda channels: wild.OriginalSRU(channels, 16),
    "groupbn-hard-normalized": lambda channels: wild.NormalizedSRU(channels, 4),
    "groupnorm-soft": lambda channels: wild.SoftSRU(channels, 4),
}
EXPORTERS = ("TorchScript", "torch.export")
_COLUMNS = {
    "variant": "variant",
    "parameters": "parameters",
    "exporter": "exporter",
    "batch": "batch",
    "opset": "opset",
    "simplified by": "before",
    "nodes": "nodes",
    "fused": "fused",
    "found": "found",
    "gates": "gates",
    "changed by the file": "changed_by_file",
    "changed by the result": "changed_by_result",
    "unexplained": "unexplained",
    "parity": "parity",
    "rewrite": "rewrite_s",
    "in all": "total_s",
}


@dataclass(frozen=True)
class Form:
    """One file: what is exported and how; ``trained`` parameters, or those of a new network (beta = 0)."""

    variant: str
    trained: bool
    exporter: str
    dynamic: bool
    opset: int


def naive_resnet20(variant: str = "groupbn-hard", trained: bool = True, seed: int = 0) -> nn.Module:
    """A ResNet-20 whose second 3x3s are ScConvs in user code; also a factory for the command line."""
    torch.manual_seed(seed)
    model = MODELS["resnet20"].build(second=lambda channels, _: _ScConv(VARIANTS[variant](channels), channels))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".sru." not in name:
            continue
        beta = name.endswith(("beta", "bias"))
        drawn = torch.randn(parameter.shape, generator=generator)
        # a new network of the public code has gamma drawn (or 1, in nn.GroupNorm) and beta 0
        values = (0.5 * drawn if trained else torch.zeros_like(drawn)) if beta else 1 + 0.5 * drawn
        parameter.data.copy_(values)
    return model.eval()


class _ScConv(nn.Module):
    def __init__(self, sru: nn.Module, channels: int) -> None:
        super().__init__()
        self.sru, self.cru = sru, wild.OriginalCRU(channels)

    def forward(self, x):
        return self.cru(self.sru(x))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--opsets", action="store_true", help="one form at each opset instead of every form")
    parser.add_argument("--untrained", action="store_true", help="beta = 0 alone")
    parser.add_argument("--variant", choices=VARIANTS, help="this one alone")
    parser.add_argument("--exporter", choices=EXPORTERS, help="this one alone")


def run(options: argparse.Namespace) -> None:
    simplifiers: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {"nothing": lambda proto: proto}
    if not options.opsets:
        simplifiers |= _simplifiers()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for form in _opsets() if options.opsets else _forms():
            if options.variant not in (None, form.variant) or options.exporter not in (None, form.exporter):
                continue
            if options.untrained and form.trained:
                continue
            exported = _export(form, options.seed)
            for before, simplify in simplifiers.items():
                rows.append(_row(form, before, simplify(exported), Path(folder), options.seed))
                print(" ".join(str(rows[-1][key]) for key in _COLUMNS.values()), flush=True)
    write(options.results, rows, _COLUMNS, seed=options.seed, srus=SRUS, onnxslim=_version("onnxslim"))


def _forms() -> Iterator[Form]:
    for variant in VARIANTS:
        for trained in (True, False):
            for exporter in EXPORTERS:
                for dynamic in (False, True):
                    yield Form(variant, trained, exporter, dynamic, 17 if exporter == "TorchScript" else 18)


def _opsets() -> Iterator[Form]:
    """TorchScript's exporter knows 20 at most, that of torch.export 18 at least."""
    for variant in VARIANTS:
        for opset in range(13, 21):
            yield Form(variant, True, "TorchScript", bool(opset % 2), opset)
        for opset in range(18, 24):
            yield Form(variant, True, "torch.export", bool(opset % 2), opset)


def _simplifiers() -> dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]]:
    found: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
        "onnxsim": lambda proto: onnxsim.simplify(proto)[0]
    }
    if importlib.util.find_spec("onnxslim") is None:
        print("onnxslim is not installed: its forms are left out")
        return found
    import onnxslim

    return found | {"onnxslim": onnxslim.slim}


def _export(form: Form, seed: int) -> onnx.ModelProto:
    """As torch's documentation says."""
    model = naive_resnet20(form.variant, form.trained, seed)
    x = subjects.noise((2, 3, 32, 32), seed)
    names = {"input_names": ["image"], "output_names": ["logits"], "opset_version": form.opset}
    with subjects._quiet():
        if form.exporter == "TorchScript":
            buffer = io.BytesIO()
            axes = {"image": {0: "batch"}, "logits": {0: "batch"}} if form.dynamic else None
            torch.onnx.export(model, (x,), buffer, dynamo=False, dynamic_axes=axes, **names)
            return onnx.load_model_from_string(buffer.getvalue())
        shapes = ({0: torch.export.Dim("batch", min=2, max=64)},) if form.dynamic else None
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False, dynamic_shapes=shapes, **names)
        if program is None:
            raise RuntimeError("torch.onnx.export(dynamo=True) returned no program.")
        return program.model_proto


def _row(form: Form, before: str, proto: onnx.ModelProto, folder: Path, seed: int) -> Row:
    source = folder / "in.onnx"
    source.write_bytes(proto.SerializeToString())
    row: Row = {
        "variant": form.variant,
        "parameters": "trained" if form.trained else "beta = 0",
        "exporter": form.exporter,
        "batch": "dynamic" if form.dynamic else "static",
        "opset": next(o.version for o in proto.opset_import if not o.domain),
        "before": before,
        "nodes": len(proto.graph.node),
    }
    reference = ModelSpec(
        f"{Path(__file__)}:naive_resnet20",
        {"variant": form.variant, "trained": form.trained, "seed": seed},
        inputs=(InputSpec.parse("2x3x32x32"),),
        dynamic=(DynamicAxis.parse_batch("2:2:8"),) if form.dynamic else (),
        seed=seed,
    )
    start = time.perf_counter()
    try:
        result = rewrite_onnx(
            source, folder / "out.onnx", options=RewriteOptions(expect=0), reference=reference, force=True
        )
    except ModelError as error:
        return row | {"found": SRUS, "fused": 0, "parity": str(error)}
    return row | _facts(result) | {"total_s": time.perf_counter() - start}


def _facts(result: RewriteResult) -> Row:
    if result.guard is None or result.parity is None:
        raise RuntimeError("a reference was given, so both were compared")
    gates = result.guard.gates
    counts = [count for sru in result.parity.srus for count in (sru.free_running, sru.teacher_forced)]
    return {
        "found": len(result.sites) + len(result.near_misses),
        "fused": len(result.sites),
        "reasons": sorted({miss.reason for miss in result.near_misses}),
        "gates": sum(gate.file.gates for gate in gates),
        "changed_by_file": result.guard.file_changed,
        "changed_by_result": result.guard.rewritten_changed,
        "unexplained": sum(gate.rewritten.unexplained for gate in gates)
        + sum(count.unexplained for count in counts if count is not None),
        "parity": "passed" if result.parity else result.parity.failures[0],
        "rewrite_s": next(stage.seconds for stage in result.stages if stage.name == "rewrite"),
    }


def _version(package: str) -> str:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else "not installed"
