"""Sites of a placement: what ``--keep`` can leave in float on its own.

A layer with its input and its weights is a site, with all calls that share the weights. So is the skip of a residual
Add. The inputs of a Concat follow the layers that read it.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from scconv_deploy.graph.contract import MODULE
from scconv_deploy.precision.float32 import all_nodes
from scconv_deploy.precision.int8 import Prepared
from scconv_deploy.precision.patterns import matching, names_of
from scconv_deploy.precision.placement import LAYERS, multiply_adds_of, name_of


@dataclass(frozen=True)
class Site:
    """One site.

    Attributes:
        name: pattern that matches this site alone.
        kind: operator, ``Conv``, ``Gemm`` or ``Add``.
        multiply_adds: for one row; None if a shape is not known.
        weight_bytes: bytes of its weights in the float file.
    """

    name: str
    kind: str
    multiply_adds: int | None
    weight_bytes: int


def sites_of(found: Prepared) -> list[Site]:
    """Sites of a placement, in the graph's order."""
    placement = found.placement
    by_weight: dict[ir.Value | None, list[ir.Node]] = {}
    for node in placement.layers:
        by_weight.setdefault(node.inputs[1], []).append(node)
    skips = {node for readers in placement.readers.values() for node, _ in readers if node.op_type == "Add"}
    units = [*by_weight.values(), *([node] for node in skips)]
    rivals = [node for node in all_nodes(found.model) if node.op_type in (*LAYERS, "Add")]
    places = {node: place for place, node in enumerate(found.model.graph)}
    units.sort(key=lambda nodes: places[nodes[0]])
    return [_site(nodes, rivals) for nodes in units]


def _site(nodes: list[ir.Node], rivals: Iterable[ir.Node]) -> Site:
    first = nodes[0]
    names = [*([first.metadata_props.get(MODULE)] if first.op_type == "Add" else []), name_of(first), *names_of(first)]
    patterns = [glob.escape(name) for name in names if name]
    name = next(
        (p for p in patterns if all(r in nodes for r in rivals if matching(r, [p], modules=True))), patterns[-1]
    )
    weight = first.inputs[1].const_value if first.op_type in LAYERS and first.inputs[1] is not None else None
    counts = [multiply_adds_of(node) if node.op_type in LAYERS else 0 for node in nodes]
    total = None if None in counts else sum(count for count in counts if count is not None)
    return Site(name, first.op_type, total, weight.nbytes if weight is not None else 0)
