"""Fuse the two paths of a CRU without a concatenation of 2C channels.

Before, as public code writes it, with a Split or two Slices at C::

    z = Concat(y1, y2);  p = Softmax(mean(z)) * z;  y = p[:, :C] + p[:, C:]

After: ``s1, s2 = Split(Softmax(Concat(mean(y1), mean(y2))))`` and ``y = s1 * y1 + s2 * y2``. Every number is computed
from the same numbers in the same order, so the result is equal to the bit unless a runtime takes another kernel for a
mean.

Refused, with the reason: a softmax along another axis, or over the two paths of each channel (the paper's Eq. 8, which
concatenates nothing); weights that are not of the features' own means; halves between which no border of the
concatenation lies; and a fusion whose tensors other nodes need.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriterContext, RewriteRuleClassBase

from scconv_deploy.graph.cru import (
    Fusion,
    mean_like,
    mean_of,
    node_before,
    operator,
    read_concatenated,
    read_halves,
    softmax_behind,
    with_channels,
)

NAME = "cru halves"
_PAIRWISE = "its softmax runs over the two paths of each channel (the paper's Eq. 8): it concatenates no features"


class FuseHalves(RewriteRuleClassBase):
    """Rule of this module."""

    def __init__(self) -> None:
        super().__init__(NAME, remove_nodes=False)

    def pattern(self, op: Any, first: Any, second: Any) -> Any:
        return op.Add(first, second, _outputs=["y"])

    def check(self, context: Any, y: ir.Value, **_: Any) -> MatchResult:
        result = MatchResult()
        add = y.producer()
        reading = None if add is None else read_concatenated(add) or _other_fusion(add)
        if reading is None:
            return result.fail()  # any other Add is no candidate
        return result.fail(reading, [y]) if isinstance(reading, str) else result

    def rewrite(self, op: RewriterContext, y: ir.Value, **_: Any) -> ir.Value:
        add = y.producer()
        reading = None if add is None else read_concatenated(add)
        if not isinstance(reading, Fusion):
            raise ValueError("rewrite() follows check()")
        paths = []
        for parts in (reading.first, reading.second):
            if len(parts) == 1:
                paths.append(parts[0])
            else:
                paths.append(with_channels(op.Concat(*parts, axis=1), parts[0], reading.channels))
        y1, y2 = paths
        means = [
            with_channels(mean_like(reading.mean, op, path), path, reading.channels, pooled=True) for path in paths
        ]
        both = with_channels(op.Concat(*means, axis=1), y1, 2 * reading.channels, pooled=True)
        weights = with_channels(op.Softmax(both, axis=1), y1, 2 * reading.channels, pooled=True)
        s1, s2 = op.Split(weights, axis=1, num_outputs=2, _outputs=2)
        weighted = []
        for share, path in ((s1, y1), (s2, y2)):
            with_channels(share, path, reading.channels, pooled=True)
            weighted.append(with_channels(op.Mul(share, path), path, reading.channels))
        return op.Add(*weighted)


def _other_fusion(add: ir.Node) -> str | None:
    """Why a sum of two products with parts of one softmax over means is not rewritten; None for any other sum."""
    products = [None if value is None else value.producer() for value in add.inputs]
    softmaxes = []
    for product in products:
        factors = product.inputs if product is not None and operator(product) == "Mul" else ()
        softmaxes.append(next((found for found in map(softmax_behind, factors) if found is not None), None))
    if softmaxes[0] is None or softmaxes[0] is not softmaxes[1] or read_halves(add) is not None:
        return None
    joined = node_before(softmaxes[0])
    if joined is None or operator(joined) != "Concat" or not all(_is_mean(value) for value in joined.inputs):
        return None
    return _PAIRWISE


def _is_mean(value: ir.Value | None) -> bool:
    node = None if value is None else value.producer()
    while node is not None and operator(node) in ("Unsqueeze", "Reshape"):
        node = node_before(node)
    return node is not None and operator(node) in ("GlobalAveragePool", "ReduceMean") and mean_of(node) is not None


RULES = (FuseHalves.rule(),)
