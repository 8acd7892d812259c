"""Every SRU of a half file fed the same half input, whoever wrote the file: gates and outputs beside PyTorch's float32.

The file is run in its stand-in (``scconv_deploy.runtimes.stand_in``), which rounds wherever the file says half.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor, nn

from benchmarks import subjects
from scconv_deploy.graph.contract import DOMAIN
from scconv_deploy.graph.types import UNIT_ROUNDOFF, HalfPrecision
from tests.wild import OriginalSRU

TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
_RIGHT = 4.0
"""Unit roundoffs: y is one or two roundings of its own away, or another element altogether."""
_GATE = "GreaterOrEqual"


@dataclass(frozen=True)
class Recorded:
    """One SRU: its input rounded to half (as float32), and PyTorch's float32 answer to it."""

    x: Tensor
    y: Tensor
    open: Tensor


def record(model: nn.Module, image: Tensor, precision: HalfPrecision) -> list[Recorded]:
    """Inputs as the float32 network makes them, in the order of the calls."""
    found: list[Recorded] = []
    modules = [module for module in model.modules() if isinstance(module, OriginalSRU)]
    inputs: list[Tensor] = []
    handles = [module.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for module in modules]
    with torch.inference_mode():
        model(image)
        for handle in handles:
            handle.remove()
        for module, x in zip(modules, inputs, strict=True):
            rounded = x.to(TORCH[precision]).float()
            y, mask = answer(module, rounded)
            found.append(Recorded(rounded, y, mask))
    return found


def answer(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(y, open) of one OriginalSRU, as it computes them in the type that it has."""
    masks: list[Tensor] = []
    handle = module.sigomid.register_forward_hook(lambda _, __, r: masks.append(r >= module.gate_treshold))
    with torch.inference_mode():
        y = module(x)
    handle.remove()
    return y, masks[0]


def in_torch(model: nn.Module, recorded: Sequence[Recorded], precision: HalfPrecision) -> dict[str, float]:
    """The same of ``model.half()`` or ``model.bfloat16()`` in PyTorch."""
    half = copy.deepcopy(model).to(TORCH[precision])
    modules = [module for module in half.modules() if isinstance(module, OriginalSRU)]
    pairs = [answer(module, site.x.to(TORCH[precision])) for module, site in zip(modules, recorded, strict=True)]
    return compare([(y.float(), mask) for y, mask in pairs], recorded, precision)


def in_file(
    float_copy: onnx.ModelProto, ends: Sequence[tuple[str, str]], recorded: Sequence[Recorded], precision: HalfPrecision
) -> dict[str, float]:
    """Of a file's stand-in.

    Args:
        ends: (input, output) of each SRU in the file that was converted, see :func:`ends_of_srus`.
    """
    model = _cut_open(float_copy, ends)
    gates = [value.name for value in model.graph.output][len(ends) :]
    session = subjects.session(model.SerializeToString())
    values = session.run(None, {name: site.x.numpy() for (name, _), site in zip(ends, recorded, strict=True)})
    tensors = [torch.from_numpy(value) for value in values]
    if len(gates) != len(ends):
        raise RuntimeError(f"{len(gates)} comparisons for {len(ends)} SRUs")
    return compare(list(zip(tensors[: len(ends)], tensors[len(ends) :], strict=True)), recorded, precision)


def compare(
    found: Sequence[tuple[Tensor, Tensor]], recorded: Sequence[Recorded], precision: HalfPrecision
) -> dict[str, float]:
    """Over all SRUs together: gates changed, share of outputs wrong, relative L2."""
    gates = changed = wrong = 0
    off = size = 0.0
    for (y, mask), site in zip(found, recorded, strict=True):
        gates += mask.numel()
        changed += int((mask != site.open).sum())
        error = (y - site.y).abs()
        wrong += int((error > _RIGHT * UNIT_ROUNDOFF[precision] * site.y.abs() + np.finfo(np.float16).tiny).sum())
        off += float((y - site.y).double().square().sum())
        size += float(site.y.double().square().sum())
    return {
        "sru_gates": gates,
        "sru_gates_changed": changed,
        "sru_outputs_wrong": wrong / gates,
        "sru_relative_l2": (off / size) ** 0.5,
    }


def ends_of_srus(model: onnx.ModelProto) -> list[tuple[str, str]]:
    """(input, output) of each SRU: of its node, or around the comparison in an export of OriginalSRU."""
    nodes = [node for node in model.graph.node if node.domain == DOMAIN]
    if nodes:
        return [(node.input[0], node.output[0]) for node in nodes]
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found = []
    for gate in (node for node in model.graph.node if node.op_type == _GATE):
        mask = _next(readers, gate.output[0], "Cast").output[0]
        product = _next(readers, mask, "Mul")
        x = next(name for name in product.input if name != mask)
        split = _next(readers, product.output[0], "Split")
        added = _next(readers, split.output[0], "Add")
        found.append((x, _next(readers, added.output[0], "Concat").output[0]))
    return found


def _next(readers: dict[str, list[onnx.NodeProto]], name: str, operator: str) -> onnx.NodeProto:
    return next(node for node in readers[name] if node.op_type == operator)


def _cut_open(model: onnx.ModelProto, ends: Sequence[tuple[str, str]]) -> onnx.ModelProto:
    """SRU inputs become graph inputs; outputs are the SRUs' and the comparisons."""
    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    graph = copied.graph
    wanted = {x for x, _ in ends} - {value.name for value in graph.input}
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name in wanted:
                node.output[index] = f"{name}__own"
    for name in sorted(wanted):
        graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4))
    gates = [node.output[0] for node in graph.node if node.op_type == _GATE]
    del graph.output[:]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in (*(y for _, y in ends), *gates))
    used = {name for name, _ in ends}
    left = [value for value in graph.input if value.name in used]
    del graph.input[:]
    graph.input.extend(left)
    return _needed(copied)


def _needed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without the nodes and weights that no output needs."""
    graph = model.graph
    needed = {value.name for value in graph.output}
    kept = []
    for node in reversed(graph.node):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(reversed(kept))
    graph.initializer.extend(weights)
    return model
