"""Operators of the standard domain that ONNX does not know: TensorRT users write plugins there (EfficientNMS_TRT).

onnx's checker and converter, and the simplifiers built on them, refuse the whole file for one such node. In a domain of
its own they let a node pass, so it is moved there for as long as they work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import onnx

from scconv_deploy.rewrite.functions import STANDARD_DOMAINS

APART = "scconv.unknown"
"""The domain that such nodes have meanwhile."""


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
    """Types of the standard domain that its opset has no operator for and no function of the model defines."""
    return sorted({node.op_type for node in _unknown(model)})


@contextmanager
def set_apart(model: onnx.ModelProto) -> Iterator[None]:
    """Move unknown operators into a domain of their own for the length of a block, in place."""
    move_apart(model)
    try:
        yield
    finally:
        move_back(model)


def move_apart(model: onnx.ModelProto) -> None:
    """Move unknown operators into a domain of their own, in place."""
    moved = list(_unknown(model))
    for node in moved:
        node.domain = APART
    if moved:
        for holder in (model, *model.functions):
            holder.opset_import.append(onnx.helper.make_opsetid(APART, 1))


def move_back(model: onnx.ModelProto) -> None:
    """The inverse, also of a model that was made of the moved one."""
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
        opset = next((o.version for o in holder.opset_import if o.domain in STANDARD_DOMAINS), 0)
        nodes = holder.graph.node if isinstance(holder, onnx.ModelProto) else holder.node
        for node in with_inner(nodes):
            if node.domain in STANDARD_DOMAINS and node.op_type not in defined and not _is_known(node.op_type, opset):
                yield node


def _is_known(operator: str, opset: int) -> bool:
    if not onnx.defs.has(operator, opset):
        return False
    return not onnx.defs.get_schema(operator, opset).deprecated
