"""Patterns (``*`` and ``?``) of nodes, as options name them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import onnx_ir as ir

from scconv_deploy.errors import UsageError
from scconv_deploy.graph.contract import LAYER, MODULE


def matching(node: ir.Node, patterns: Sequence[str], modules: bool = False) -> str:
    """The first pattern that matches a name of a node (:func:`names_of`); "" if none does."""
    return next((p for p in patterns if any(fnmatchcase(name, p) for name in names_of(node, modules))), "")


def names_of(node: ir.Node, modules: bool = False) -> list[str]:
    """Names of a node: its own, its outputs', those of its weights (``layer1.0.conv1.weight``).

    Args:
        modules: the paths of its module and of its weights' modules count too (``layer1.0.conv1``).
    """
    names = [node.name, *(o.name for o in node.outputs)]
    names += [v.name for v in node.inputs if v is not None and v.const_value is not None]
    if modules:
        names += [n.removesuffix(".weight") for n in names if n]
        names += [node.metadata_props.get(key) for key in (MODULE, LAYER)]
    return [name for name in dict.fromkeys(names) if name]


def require_matches(option: str, patterns: Iterable[str], nodes: Sequence[ir.Node], modules: bool = False) -> None:
    """Refuse a pattern that matches no node (UsageError)."""
    for pattern in patterns:
        if not any(matching(node, [pattern], modules) for node in nodes):
            close = get_close_matches(pattern, {name for node in nodes for name in names_of(node, modules)})
            names = f"Close are {', '.join(close)}." if close else "Take names of modules, as in 'layer1.0.*'."
            raise UsageError(f"{option} {pattern!r} matches no node or weight.", names)
