"""Operators of the standard domain that ONNX does not know: TensorRT users write plugins there (EfficientNMS_TRT).

onnx's checker and converter, and the simplifiers built on them, refuse the whole file for one such node. They let nodes
of an unknown domain pass, so such nodes are moved into one while these tools run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import onnx

from scconv_deploy.graph.contract import DOMAIN, STANDARD_DOMAINS

_KNOWN_DOMAINS = ("ai.onnx.ml", "com.microsoft")
APART = "scconv.unknown"
"""The temporary domain of unknown operators."""


def nodes_of(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of a model: of its graph, its branches and loop bodies, and its functions."""
    for holder in (model.graph, *model.functions):
        yield from with_inner(holder.node)


def with_inner(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """The nodes, and those of their branches and loop bodies."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from with_inner(graph.node)


def unknown_operators(model: onnx.ModelProto) -> list[str]:
    """Operator types of the standard domain that neither its opset nor a function of the model defines."""
    return sorted({node.op_type for node in _unknown(model)})


@contextmanager
def set_apart(model: onnx.ModelProto) -> Iterator[None]:
    """Move unknown operators into the domain :data:`APART` during a block, in place."""
    move_apart(model)
    try:
        yield
    finally:
        move_back(model)


def move_apart(model: onnx.ModelProto) -> None:
    """Move unknown operators into the domain :data:`APART`, in place."""
    moved = list(_unknown(model))
    for node in moved:
        node.domain = APART
    if moved:
        for holder in (model, *model.functions):
            holder.opset_import.append(onnx.helper.make_opsetid(APART, 1))


def move_back(model: onnx.ModelProto) -> None:
    """Undo :func:`move_apart`, in place; also for a model that a tool made of the moved one."""
    for node in nodes_of(model):
        if node.domain == APART:
            node.domain = ""
    for holder in (model, *model.functions):
        kept = [entry for entry in holder.opset_import if entry.domain != APART]
        if len(kept) < len(holder.opset_import):
            del holder.opset_import[:]
            holder.opset_import.extend(kept)


def _unknown(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    defined = {function.name for function in model.functions if function.domain in STANDARD_DOMAINS}
    for holder in (model, *model.functions):
        opset = _opset(holder)
        nodes = holder.graph.node if isinstance(holder, onnx.ModelProto) else holder.node
        for node in with_inner(nodes):
            if node.domain in STANDARD_DOMAINS and node.op_type not in defined and not _is_known(node.op_type, opset):
                yield node


def _opset(holder: onnx.ModelProto | onnx.FunctionProto) -> int:
    return next((entry.version for entry in holder.opset_import if entry.domain in STANDARD_DOMAINS), 0)


def _is_known(operator: str, opset: int) -> bool:
    if not onnx.defs.has(operator, opset):
        return False
    return not onnx.defs.get_schema(operator, opset).deprecated


def foreign_operators(model: onnx.ModelProto) -> list[str]:
    """Operators that neither ONNX nor ONNX Runtime nor a function of the model defines, as ``domain::type``."""
    return sorted({f"{n.domain}::{n.op_type}".removeprefix("::") for n in _foreign(model, model.graph.node)})


def before_foreign(one: onnx.ModelProto, other: onnx.ModelProto) -> tuple[onnx.ModelProto, onnx.ModelProto] | None:
    """Both models cut before their foreign operators, with all values as outputs that both have; None without any.

    Args:
        one, other: two forms of one network; equal names mean the same tensor.
    """
    cuts = [_cut(model) for model in (one, other)]
    names = [name for name in cuts[0] if name in cuts[1]]
    if not names:
        return None
    first, second = (_up_to(model, names) for model in (one, other))
    return first, second


def _foreign(model: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Foreign operators among nodes of a model, inner ones included."""
    known = {*STANDARD_DOMAINS, DOMAIN, *_KNOWN_DOMAINS}
    defined = {(function.domain, function.name) for function in model.functions}
    opset = _opset(model)
    for node in with_inner(nodes):
        if (node.domain, node.op_type) in defined:
            continue
        standard = node.domain in STANDARD_DOMAINS
        if not _is_known(node.op_type, opset) if standard else node.domain not in known:
            yield node


def _cut(model: onnx.ModelProto) -> list[str]:
    """Names of the outputs that no foreign operator affects, and of the inputs of foreign operators."""
    lost, found = _lost(model), []
    for node in model.graph.node:
        if lost.intersection(node.output):
            found += [name for name in node.input if name]
    given = {v.name for v in model.graph.input} | {tensor.name for tensor in model.graph.initializer}
    wanted = dict.fromkeys([*(v.name for v in model.graph.output), *found])
    return [name for name in wanted if name not in lost and name not in given]


def _lost(model: onnx.ModelProto) -> set[str]:
    """Values that foreign operators affect; the nodes are in topological order."""
    lost: set[str] = set()
    for node in model.graph.node:
        reads = {name for inner in with_inner([node]) for name in inner.input}
        if lost & reads or any(_foreign(model, [node])):
            lost.update(filter(None, node.output))
    return lost


def _up_to(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    cut = onnx.ModelProto()
    cut.CopyFrom(model)
    lost = _lost(model)
    for index in reversed([i for i, node in enumerate(model.graph.node) if lost.intersection(node.output)]):
        del cut.graph.node[index]
    described = {v.name: v for v in (*model.graph.value_info, *model.graph.output)}
    del cut.graph.output[:]
    cut.graph.output.extend(described.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return cut
