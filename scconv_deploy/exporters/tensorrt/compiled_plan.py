"""Kernels of a compiled plan and the bytes that they move, read from the builder's own log. Needs no GPU.

With detailed profiling, TensorRT and TensorRT-RTX end a build with one verbose message that lists each kernel with its
inputs, constants and outputs (measured: TensorRT-RTX 1.7.1). The bytes of a kernel are those of its inputs and outputs:
at the sizes of these networks, memory traffic is what a fused or an unfused operator costs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from scconv_deploy.runtimes.tensorrt.engine import CompiledPlan, EngineProfile, EngineQuantized, PlanLayer

_START = "Layers:\n"
_LINE = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*)\], "
    r"Outputs: \[(?P<outputs>.*?)\](?:, (?:TacticName|StreamId|Metadata): .*?)*?(?:, Metadata: (?P<nodes>.*))?$"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d,]*)\], .*?Datatype: (?P<type>\w+), ")
_FURTHER_PROFILE = re.compile(r" \[profile [1-9]\d*\]")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
_BYTES = {
    "Float": 4, "Half": 2, "BFloat16": 2, "Int8": 1, "UInt8": 1, "FP8": 1, "Bool": 1, "Int32": 4, "Int64": 8,
}  # fmt: skip
_NO_PRODUCT = ("kgen", "custom_layer")
"""Kernels of element-wise operators and reductions, which may end or begin a layer; and plugins."""
_NO_KERNEL = re.compile(r"^Name: .*?, LayerType: (signal|wait|shape_call|ShapeHostToDevice), ")
"""Entries that launch nothing: they order streams, or compute shapes on the host (of an open height) and copy them."""


def compiled_plan(messages: Iterable[tuple[str, str]], optimum: int | None) -> CompiledPlan | None:
    """The kernels that a builder listed, those of the first optimization profile where there are several.

    The kernels of each further profile follow, and name the engine's tensors with ``[profile N]`` (measured).

    Args:
        messages: severity and text of the build's log.
        optimum: what an open batch counts as, see :func:`open_batch`.

    Returns:
        None if this library listed none, or lists them in words that are not known here.
    """
    text = next((text for _, text in messages if text.startswith(_START)), "")
    layers: list[PlanLayer] = []
    for line in text.splitlines():
        if not line.startswith("Name: "):
            if layers:
                break  # the tensors of the engine follow
            continue
        if _NO_KERNEL.match(line):
            continue
        found = _LINE.match(line)
        if found is None:
            return None
        if _FURTHER_PROFILE.search(line):
            break
        inputs, outputs, constants = (_TENSOR.findall(found[part]) for part in ("inputs", "outputs", "constants"))
        nodes = tuple(dict.fromkeys(_NODE.findall(found["nodes"] or "")))
        # an integer kernel holds its weights; one that dequantises them first reads them as its second input
        operands = tuple(kind for _, _, kind in [*inputs[:1], *(constants or inputs[1:])[:1]])
        layers.append(PlanLayer(found["name"], found["kind"], _bytes(inputs + outputs, optimum), nodes, operands))
    if not layers:
        return None
    total = sum(layer.bytes_moved or 0 for layer in layers)
    known = all(layer.bytes_moved is not None for layer in layers)
    return CompiledPlan(total if known else None, len(layers), optimum, tuple(layers))


def quantized_layers(nodes: Iterable[str], plan: CompiledPlan | None) -> tuple[EngineQuantized, ...]:
    """Types that the kernels of layers multiply.

    Args:
        nodes: names of the layers' ONNX nodes.
        plan: the kernels; None if they are not known.
    """
    kernels = [] if plan is None else [layer for layer in plan.layers if layer.kind not in _NO_PRODUCT]
    found = []
    for node in nodes:
        operands = [kernel.operands for kernel in kernels if node in kernel.nodes]
        exact = next((one for one in operands if EngineQuantized(node, one).in_int8), None)
        found.append(EngineQuantized(node, exact or next(iter(operands), ())))
    return tuple(found)


def open_batch(profiles: Sequence[EngineProfile]) -> int | None:
    """The optimum of an open batch in the first optimization profile.

    None where no axis is open, or another one is, or inputs differ in it. An axis is open if the profiles, taken
    together, have several sizes for it.
    """
    optima = set()
    for first in (profile for profile in profiles if profile.index == 0):
        own = [profile for profile in profiles if profile.input == first.input]
        shapes = [shape for profile in own for shape in (profile.minimum, profile.optimum, profile.maximum)]
        is_open = [len(set(sizes)) > 1 for sizes in zip(*shapes, strict=True)]
        if any(is_open[1:]):
            return None
        if any(is_open):
            optima.add(first.optimum[0])
    return optima.pop() if len(optima) == 1 else None


def _bytes(tensors: Sequence[tuple[str, str, str]], optimum: int | None) -> int | None:
    total = 0
    for _, shape, kind in tensors:
        sizes = [int(size) for size in shape.split(",") if size]
        if -1 in sizes[1:] or (-1 in sizes and optimum is None) or kind not in _BYTES:
            return None
        total += _BYTES[kind] * math.prod(optimum if size == -1 and optimum else size for size in sizes)
    return total
