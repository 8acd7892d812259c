"""Placement of quantisers in a float graph, node by node, each with its reason.

- Conv and Gemm: input and weights. Every use of one weight is quantised, or none.
- An SRU is a fence: nothing inside it is quantised, its parameters stay float32, and it reads what it read.
- A residual Add: the skip, so that it travels as int8; not the trunk, whose sum would be rounded twice.
- A Concat that only quantised layers read: its inputs, with one scale for all of them.
- In float: the first and the last layers (few multiply-adds, and all of the error is seen), layers that read a pooled
  mean, and everything else (softmax, means, norms).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from scconv_deploy.errors import UsageError
from scconv_deploy.graph.contract import DOMAIN, LAYER, MODULE
from scconv_deploy.graph.merged import parts_of
from scconv_deploy.graph.quantization import layer_path
from scconv_deploy.precision.float32 import all_nodes, graphs_of
from scconv_deploy.precision.patterns import matching, require_matches

LAYERS = ("Conv", "Gemm")
"""Operators that are quantised; their weights are input 1."""
_OTHER_LAYERS = ("ConvTranspose", "DeformConv", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "Attention")
_MEANS = ("GlobalAveragePool", "ReduceMean")
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16}

_NOWHERE = "the file does not say which module in PyTorch has its weights"

Reader = tuple[ir.Node, int]
"""A node, and the index of its input."""
Unprovable = Callable[[str, str, np.ndarray], str]
"""(path of a layer, path of the norm folded into it, its weights with output channels first) -> why PyTorch has no
such layer that could be fake-quantised; "" if it has one."""


@dataclass(frozen=True)
class PlacementOptions:
    """Choice of layers.

    Attributes:
        keep: patterns of nodes, weights and modules that stay in float.
        only: patterns of those that are quantised, the first and last layers too if they match; empty for all.
        skips_alone: accept a placement of skips without a layer: to measure it, for it saves nothing.
    """

    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    skips_alone: bool = False


@dataclass(eq=False)
class Placement:
    """Quantised nodes and values of a graph.

    Attributes:
        layers: quantised Conv and Gemm nodes, in the graph's order.
        readers: value -> the inputs that read it quantised.
        groups: values that share one scale, by any of them; a value without an entry has its own.
        chosen, kept: (node, reason) of what is quantised and of what is not.
        multiply_adds: (quantised, all) of the layers, of one row; None if a shape is not known.
    """

    layers: list[ir.Node] = field(default_factory=list)
    readers: dict[ir.Value, list[Reader]] = field(default_factory=dict)
    groups: dict[ir.Value, list[ir.Value]] = field(default_factory=dict)
    chosen: list[tuple[str, str]] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    multiply_adds: tuple[int, int] | None = None

    @property
    def values(self) -> list[ir.Value]:
        """Quantised values, in the order in which they were chosen."""
        return list(self.readers)

    def group_of(self, value: ir.Value) -> list[ir.Value]:
        """Values that share the scale of a value."""
        return self.groups.get(value, [value])


def place(
    model: ir.Model, options: PlacementOptions = PlacementOptions(), unprovable: Unprovable | None = None
) -> Placement:
    """Choose the quantisers of a graph.

    Args:
        model: with the types of its values, constants as initializers; not changed.
        unprovable: why nothing could prove a layer; such layers stay in float. None without a model to prove by.

    Raises:
        UsageError: a pattern matches nothing, or no layer is left to quantise.
    """
    nodes = all_nodes(model)
    require_matches("--keep", options.keep, nodes, modules=True)
    require_matches("--only", options.only, nodes, modules=True)
    placing = _Placing(model, options, unprovable)
    placing.layers()
    placing.skips()
    placing.concats()
    if not placing.found.layers and not (options.skips_alone and placing.found.readers):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in placing.found.kept[:3])
        remedy = "Name layers with --only PATTERN, which takes first and last layers too."
        if any(reason.endswith(_NOWHERE) for _, reason in placing.found.kept):
            remedy = "Export the model with scconv-deploy export, or quantise this file without --reference."
        raise UsageError(f"No layer is left to quantise ({reasons or 'the graph has no Conv and no Gemm'}).", remedy)
    placing.count()
    return placing.found


class _Placing:
    """One placement and its state."""

    def __init__(self, model: ir.Model, options: PlacementOptions, unprovable: Unprovable | None) -> None:
        self._model, self._options, self._unprovable = model, options, unprovable
        self._nodes = list(model.graph)
        self._inner = [node for node in all_nodes(model) if node.graph is not model.graph]
        self._has_modules = any(MODULE in node.metadata_props for node in self._nodes)
        self.found = Placement()

    # --- layers --------------------------------------------------------------------------------------------------

    def layers(self) -> None:
        reasons = {node: self._why_float(node) for node in self._nodes if node.op_type in LAYERS and node.domain == ""}
        by_weight: dict[ir.Value, list[ir.Node]] = defaultdict(list)
        for node in reasons:
            if (weight := node.inputs[1]) is not None:
                by_weight[weight].append(node)
        self._require_one_weight(reasons)
        for users in by_weight.values():
            if (first := next((node for node in users if reasons[node]), None)) is not None:
                reasons |= {n: reasons[n] or f"its weight is also that of {name_of(first)}, which stays" for n in users}
        for node, reason in reasons.items():
            if reason:
                self._keep(node, reason)
                continue
            self.found.layers.append(node)
            self._read(node, 0)
            self.found.chosen.append((name_of(node), f"{node.op_type}: input per tensor, weights per output channel"))
        for node in self._nodes:
            if node.domain == DOMAIN:
                self._keep(node, "a fence: statistics and gates in float32, parameters of its own")
            elif node.domain == "" and node.op_type in _OTHER_LAYERS and _data_inputs(node):
                self._keep(node, "the operator is not quantised")
        for node in self._inner:
            if node.op_type in (*LAYERS, *_OTHER_LAYERS):
                self._keep(node, "it stands in a branch or the body of a loop")

    def _require_one_weight(self, reasons: dict[ir.Node, str]) -> None:
        """Leave the calls of a module in float whose weights differ: a BatchNorm is folded into some of them."""
        calls: dict[str, list[ir.Node]] = defaultdict(list)
        for node, reason in reasons.items():
            if not reason and (path := path_of(node)):
                calls[path].append(node)
        for nodes in calls.values():
            first = channels_first(nodes[0])
            if not all(np.array_equal(channels_first(node), first) for node in nodes[1:]):
                reasons |= dict.fromkeys(nodes, "its module is called several times, with other weights in the graph")

    def _unproved(self, node: ir.Node) -> str:
        """Why nothing could prove a layer's quantisers; empty if that is not known to be so."""
        path, module = path_of(node), node.metadata_props.get(MODULE, "")
        if self._unprovable is None:  # of another exporter's file no verdict on its scales is expected
            return "" if path or not self._has_modules else _NOWHERE
        if not path:
            return _NOWHERE
        return self._unprovable(path, module if module != path else "", channels_first(node))

    def _why_float(self, node: ir.Node) -> str:
        """The reason if a Conv or Gemm stays in float, else empty."""
        x, weight = node.inputs[0], node.inputs[1]
        if x is None or weight is None or weight.const_value is None or weight.is_graph_input():
            return "its weights are not constants"
        if x.const_value is not None:
            return "it computes a constant"
        if x.dtype is None:
            return "the type of its input is not known"
        if x.dtype not in _FLOATS or weight.dtype not in _FLOATS:
            return f"it computes in {x.dtype}"
        if any(use.node.domain == DOMAIN for use in weight.uses()):
            return "its weights are also a parameter of a gate"
        if parts_of(weight.name or "") is not None:
            return "convolutions of a CRU that were merged have no module in PyTorch: export with --cru halves"
        if node.op_type == "Gemm" and _number(node, "alpha", 1) != 1:
            return "its alpha is not 1"
        if node.op_type == "Gemm" and _number(node, "transA", 0):
            return "its data are transposed"
        if pattern := matching(node, self._options.keep, modules=True):
            return f"kept by {pattern!r}"
        if self._options.only:
            return self._unproved(node) if matching(node, self._options.only, modules=True) else "not among --only"
        if not self._reaches([node], forward=False):
            return "a first layer: the input in full"
        if not self._reaches([node], forward=True):
            return "a last layer: the answers in full"
        return "it reads a pooled mean" if _is_pooled(x) else self._unproved(node)

    def _reaches(self, nodes: Sequence[ir.Node], forward: bool) -> bool:
        """Whether a layer stands before (or, forward, after) these nodes."""
        stack, seen = [n for node in nodes for n in _next(node, forward)], set(nodes)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node.domain == "" and node.op_type in (*LAYERS, *_OTHER_LAYERS) and _data_inputs(node):
                return True
            stack += _next(node, forward)
        return False

    # --- skips and concatenations --------------------------------------------------------------------------------

    def skips(self) -> None:
        for node in self._nodes:
            if node.op_type != "Add" or node.domain != "" or len(_data_inputs(node)) != 2:
                continue
            skip, reason = self._skip_of(node)
            if skip is None:
                continue
            if reason:
                self._keep(node, reason)
                continue
            self._read(node, skip)
            what = "skip of a residual Add; the trunk stays in float"
            self.found.chosen.append((name_of(node), f"Add: input {skip} ({node.inputs[skip].name}), the {what}"))  # type: ignore[union-attr]

    def _skip_of(self, node: ir.Node) -> tuple[int | None, str]:
        """Index of the skip of a residual Add, None if it is none; and why the skip stays in float, or empty."""
        first, second = _data_inputs(node)
        apart = _layers_apart(first, second)
        if apart is None or apart[0] == apart[1] or min(apart) > 1:
            return None, ""
        index = list(node.inputs).index(first if apart[0] < apart[1] else second)
        skip = node.inputs[index]
        if pattern := matching(node, self._options.keep, modules=True):
            return index, f"its skip is kept by {pattern!r}"
        if self._options.only and not matching(node, self._options.only, modules=True):
            return index, "its skip is not among --only"
        if self._unprovable is not None and not self._has_modules:
            return index, "the file does not say in which module in PyTorch it stands"
        if skip is None or skip.dtype not in _FLOATS or skip.is_graph_input():
            return index, "its skip is an input of the model"
        if first.shape is not None and second.shape is not None and len(first.shape) != len(second.shape):
            return index, "its inputs have other ranks"
        return index, ""

    def concats(self) -> None:
        """Inputs of concatenations that only quantised layers read; in reverse, so that nested ones follow."""
        for node in reversed(self._nodes):
            joined = node.outputs[0] if node.op_type == "Concat" and node.domain == "" else None
            if joined is None or joined not in self.found.readers or joined.is_graph_output():
                continue
            if {(use.node, use.idx) for use in joined.uses()} != set(self.found.readers[joined]):
                self._keep(node, "it is read in float too")
                continue
            values = [v for v in node.inputs if v is not None and v.const_value is None and not v.is_graph_input()]
            if len(values) < len(node.inputs):
                self._keep(node, "it joins an input of the model or a constant")
                continue
            for index in range(len(node.inputs)):
                self._read(node, index)
            self._join([joined, *values])
            self.found.chosen.append((name_of(node), "Concat: inputs, one scale for all and the result"))

    def _join(self, values: Iterable[ir.Value]) -> None:
        group = list(dict.fromkeys(v for value in values for v in self.found.group_of(value)))
        self.found.groups |= dict.fromkeys(group, group)

    # --- records -------------------------------------------------------------------------------------------------

    def _read(self, node: ir.Node, index: int) -> None:
        value = node.inputs[index]
        assert value is not None  # noqa: S101  (for the type checker: the callers looked)
        self.found.readers.setdefault(value, []).append((node, index))

    def _keep(self, node: ir.Node, reason: str) -> None:
        self.found.kept.append((name_of(node), f"{node.op_type}: {reason}"))

    def count(self) -> None:
        """Multiply-adds of the quantised layers and of all."""
        counts = {n: multiply_adds_of(n) for n in self._nodes if n.op_type in (*LAYERS, "MatMul") and n.domain == ""}
        if None in counts.values() or self._inner:
            return
        known = {node: count for node, count in counts.items() if count is not None}
        self.found.multiply_adds = sum(known[node] for node in self.found.layers), sum(known.values())


def path_of(layer: ir.Node) -> str:
    """Path of the module that has a layer's weights; "" if the file does not say."""
    weight = layer.inputs[1]
    return layer_path("" if weight is None else weight.name or "", layer.metadata_props.get(LAYER, ""))


def channels_first(layer: ir.Node) -> np.ndarray:
    """Constant weights of a layer, output channels on axis 0."""
    array = layer.inputs[1].const_value.numpy()  # type: ignore[union-attr]
    return np.moveaxis(array, output_axis(layer), 0)


def output_axis(layer: ir.Node) -> int:
    """Axis of the output channels of a layer's weights."""
    return 1 if layer.op_type == "Gemm" and not _number(layer, "transB", 0) else 0


def name_of(node: ir.Node) -> str:
    """Name of a node in reports: the path of the module that its weights belong to, or its own."""
    weight = node.inputs[1] if len(node.inputs) > 1 and node.op_type in LAYERS else None
    if weight is not None and weight.const_value is not None and weight.name:
        return path_of(node) or weight.name
    return node.name or node.outputs[0].name or node.op_type


def _number(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else float(attribute.value)


def _data_inputs(node: ir.Node) -> list[ir.Value]:
    return [v for v in node.inputs if v is not None and v.const_value is None]


def _next(node: ir.Node, forward: bool) -> list[ir.Node]:
    """Nodes that read a node's results, or give its inputs; what its inner graphs read counts as its input."""
    if forward:
        return [use.node for output in node.outputs for use in output.uses()]
    read = list(node.inputs) + [v for graph in graphs_of(node) for inner in graph for v in inner.inputs]
    return [p for v in read if v is not None and (p := v.producer()) is not None and p.graph is node.graph]


def _is_pooled(value: ir.Value) -> bool:
    """Whether a value is a pooled mean, or computed from one alone."""
    seen: set[ir.Value] = set()
    while value not in seen:
        seen.add(value)
        node = value.producer()
        if node is None or node.domain != "":
            return False
        if node.op_type in _MEANS:
            return True
        data = _data_inputs(node)
        if len(data) != 1:
            return False
        value = data[0]
    return False


def _layers_apart(first: ir.Value, second: ir.Value) -> tuple[int, int] | None:
    """Layers between two values and their nearest common ancestor; None without one."""
    one, other = _ancestors(first), _ancestors(second)
    shared = [value for value in one if value in other]
    nearest = min(shared, key=lambda v: one[v] + other[v], default=None)
    return None if nearest is None else (one[nearest], other[nearest])


def _ancestors(value: ir.Value) -> dict[ir.Value, int]:
    """Values that a value is computed from, itself included -> fewest layers between."""
    found: dict[ir.Value, int] = {}
    level, distance = [value], 0
    while level:
        further: list[ir.Value] = []
        while level:
            here = level.pop()
            if here in found:
                continue
            found[here] = distance
            node = here.producer()
            if node is None:
                continue
            layer = node.domain != "" or node.op_type in (*LAYERS, *_OTHER_LAYERS)
            (further if layer else level).extend(_data_inputs(node))
        level, distance = further, distance + 1
    return found


def multiply_adds_of(node: ir.Node) -> int | None:
    """Multiply-adds of a layer for one row; None if a shape is not known."""
    out, weight = node.outputs[0].shape, node.inputs[1]
    if out is None or weight is None or weight.shape is None:
        return None
    results = [size for size in out[1:] if isinstance(size, int)]
    sizes = [size for size in weight.shape if isinstance(size, int)]
    if len(results) < len(out) - 1 or len(sizes) < len(weight.shape):
        return None
    if node.op_type == "Conv":
        return math.prod(results) * math.prod(sizes[1:])
    return math.prod(results[:-1]) * math.prod(sizes[-2:])
