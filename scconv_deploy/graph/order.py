"""Topological order of nodes: some tools break it, and runtimes differ in whether they ask for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from typing import Any

import onnx

from scconv_deploy.errors import ModelError


def sort_nodes(model: onnx.ModelProto, name: str) -> bool:
    """Sort the nodes of every graph and function in place; a sorted one keeps its order.

    Args:
        name: of the file, for messages.

    Returns:
        whether anything was moved.

    Raises:
        ModelError: a value is produced twice, or read and never produced; or the nodes form a cycle.
    """
    inputs = [v.name for v in model.graph.input]
    stored = [t.name for t in model.graph.initializer] + [t.values.name for t in model.graph.sparse_initializer]
    for what, names in (("inputs", inputs), ("initializers", stored)):
        if twice := next((n for n, count in Counter(names).items() if count > 1), ""):
            raise _invalid(name, f"two {what} are called {twice!r}")
    known = {*inputs, *stored}
    moved = _sort(model.graph, known, name)
    for function in model.functions:
        moved |= _sort(function, set(function.input), f"{name}: function {function.domain}::{function.name}")
    return moved


def _sort(graph: Any, known: set[str], name: str) -> bool:
    """Sort a graph or function, and the graphs inside its nodes, which see its tensors."""
    nodes: Sequence[onnx.NodeProto] = graph.node
    producers = _producers(nodes, known, name)
    waits = [sorted({producers[r] for r in _reads(node) if r in producers}) for node in nodes]
    order = range(len(nodes)) if _is_sorted(waits) else _order(nodes, waits, name)
    moved = list(order) != list(range(len(nodes)))
    if moved:
        sorted_nodes = [onnx.NodeProto.FromString(nodes[index].SerializeToString()) for index in order]
        del graph.node[:]
        graph.node.extend(sorted_nodes)
    visible = known | set(producers)
    for node in graph.node:
        if missing := next((r for r in node.input if r and r not in visible), ""):
            raise _invalid(name, f"node {_label(node)} reads {missing!r}, which nothing produces")
        for inner in _graphs(node):
            own = {v.name for v in inner.input} | {t.name for t in inner.initializer}
            moved |= _sort(inner, visible | own, name)
    return moved


def _producers(nodes: Iterable[onnx.NodeProto], known: set[str], name: str) -> dict[str, int]:
    producers: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for output in filter(None, node.output):
            if output in producers:
                raise _invalid(name, f"two nodes produce {output!r}")
            if output in known:
                raise _invalid(name, f"node {_label(node)} produces {output!r}, which is an input or a constant")
            producers[output] = index
    return producers


def _is_sorted(waits: Sequence[Sequence[int]]) -> bool:
    return all(not before or before[-1] < index for index, before in enumerate(waits))


def _order(nodes: Sequence[onnx.NodeProto], waits: Sequence[Sequence[int]], name: str) -> list[int]:
    """The topological order that takes, of the nodes that are ready, the first in the present order."""
    left = [len(before) for before in waits]
    followers: list[list[int]] = [[] for _ in nodes]
    for index, before in enumerate(waits):
        for producer in before:
            followers[producer].append(index)
    ready = [index for index, count in enumerate(left) if not count]
    heapify(ready)
    order = []
    while ready:
        index = heappop(ready)
        order.append(index)
        for follower in followers[index]:
            left[follower] -= 1
            if not left[follower]:
                heappush(ready, follower)
    if len(order) < len(nodes):
        waiting = next(index for index, count in enumerate(left) if count)
        raise _invalid(name, f"node {_label(nodes[waiting])} depends on its own result")
    return order


def _reads(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the values that a node needs, those that its inner graphs take from outside included."""
    yield from filter(None, node.input)
    for inner in _graphs(node):
        own = {v.name for v in inner.input} | {t.name for t in inner.initializer}
        own |= {output for inner_node in inner.node for output in inner_node.output}
        yield from (read for inner_node in inner.node for read in _reads(inner_node) if read not in own)
        yield from (value.name for value in inner.output if value.name not in own)


def _graphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _label(node: onnx.NodeProto) -> str:
    return f"{node.name or next(iter(node.output), '?')} ({node.op_type})"


def _invalid(name: str, reason: str) -> ModelError:
    return ModelError(f"{name} is not a valid graph: {reason}.", "Export it again, or ask the tool that wrote it.")
