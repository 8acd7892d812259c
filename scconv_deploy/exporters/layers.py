"""Modules of the convolutions and linear layers of an export: whose weights each node has.

The name of an initializer is not enough. Modules that share a weight have one initializer of one name; a simplifier
that folds a BatchNorm into one of them, or turns ``MatMul + Add`` into a Gemm, makes new names for weights and results.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from scconv_deploy.graph.contract import LAYER, MODULE

_LAYERS = ("Conv", "Gemm", "MatMul")
_WEIGHT = ".weight"


@dataclass(frozen=True)
class _Layer:
    """A layer of the graph before it was simplified: its module, its results, its bias, and the norm that reads it."""

    module: str
    results: tuple[str, ...]
    bias: str
    norm: str


class Layers:
    """Layers of an export by the names of their weights.

    Args:
        model: the graph before it is simplified; not changed, and not kept.
        modules: module of each value, by its name.
        norms: paths of BatchNorms. The exporter folds one into a convolution that it alone reads, whose weights then
            keep their name.
    """

    def __init__(self, model: ir.Model, modules: Mapping[str, str], norms: Collection[str]) -> None:
        self._by_weight: dict[str, list[_Layer]] = {}
        for node in model.graph:
            if node.domain != "" or node.op_type not in _LAYERS or node.inputs[1] is None:
                continue
            module = modules.get(node.outputs[0].name or "", "")
            if module and module not in norms:
                self._by_weight.setdefault(node.inputs[1].name or "", []).append(_read(node, module, modules))

    def describe(self, model: ir.Model) -> None:
        """Write :data:`.contract.LAYER` on the nodes of the simplified graph whose weights' names do not say it.

        A node whose BatchNorm was folded under the name of the convolution's result gets that BatchNorm's module.
        """
        left = {weight: list(found) for weight, found in self._by_weight.items()}
        everything = [layer for found in left.values() for layer in found]
        values = {value.name for node in model.graph for value in node.outputs}
        for node in model.graph:
            if node.domain != "" or node.op_type not in ("Conv", "Gemm") or node.inputs[1] is None:
                continue
            weight = node.inputs[1].name or ""
            layer = _named(node, everything) or _of_weight(node, left.get(weight, []))
            if layer is None:
                continue
            if layer in left.get(weight, []):
                left[weight].remove(layer)
            if weight != f"{layer.module}{_WEIGHT}":
                node.metadata_props[LAYER] = layer.module
            folded = layer.norm and node.outputs[0].name == layer.results[0] and weight not in self._by_weight
            if folded and not any(norm in values for norm in layer.results[1:]):
                node.metadata_props[MODULE] = layer.norm


def _read(node: ir.Node, module: str, modules: Mapping[str, str]) -> _Layer:
    """A layer with what stands behind it: the Add of its bias, or the BatchNorm that alone reads it."""
    result, bias, norm = node.outputs[0], "", ""
    results = [result.name or ""]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = node.inputs[2].name or ""
    readers = [use.node for use in result.uses()]
    if len(readers) == 1 and not result.is_graph_output():
        behind = readers[0].outputs[0].name or ""
        if readers[0].op_type == "BatchNormalization":
            norm = modules.get(behind, "")
            results.append(behind)
        elif readers[0].op_type == "Add" and modules.get(behind) == module:
            bias = next((v.name or "" for v in readers[0].inputs if v is not None and v is not result), "")
            results.append(behind)
    return _Layer(module, tuple(results), bias, norm)


def _named(node: ir.Node, layers: list[_Layer]) -> _Layer | None:
    """The layer of which a node has a result, perhaps in another shape."""
    names = {node.outputs[0].name}
    names |= {use.node.outputs[0].name for use in node.outputs[0].uses() if use.node.op_type == "Reshape"}
    return next((layer for layer in layers if names & set(layer.results)), None)


def _of_weight(node: ir.Node, layers: list[_Layer]) -> _Layer | None:
    """The layer among those of a node's weight that has its bias, or the first: a simplifier keeps their order."""
    bias = node.inputs[2].name if len(node.inputs) > 2 and node.inputs[2] is not None else ""
    return next((layer for layer in layers if layer.bias == bias), layers[0] if layers else None)
