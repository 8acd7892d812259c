"""Attributes of SRU nodes, and the functions that a graph with SRU nodes needs."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from scconv_deploy.gate.variant import GateVariant
from scconv_deploy.graph.contract import DOMAIN, DOMAIN_VERSION, FunctionKey, MaskForm, node_attributes
from scconv_deploy.graph.functions import function_proto


def variant_attributes(variant: GateVariant) -> dict[str, Any]:
    """Attributes of an SRU node of a variant."""
    return node_attributes(variant.num_groups, variant.ddof, variant.eps_var, variant.eps_std)


LONGEST_ROW = 4096
"""Longest row (last axis, in elements) whose squares the body for whole groups sums accurately enough.

ONNX Runtime's ReduceSumSquare adds a row one by one. Measured (version 1.32, normal data, in units of 2**-24, mean and
largest of 128 rows): 11 and 39 for 3,136 elements, 25 and 86 for 16,384, 120 and 290 for 65,536; the bound of a gate
allows some 12 for s. The other body compensates its sums, and its error does not grow with the row."""


def _is_long(x: ir.Value | None) -> bool:
    """Whether rows are longer than ``LONGEST_ROW``, or may be: a signal ``[N, C, 1, L]`` of open length."""
    if x is None or x.shape is None or len(x.shape) != 4:
        return False
    height, width = x.shape[2], x.shape[3]
    return width > LONGEST_ROW if isinstance(width, int) else height == 1


def add_functions(model: ir.Model, mask_form: MaskForm, opset: int) -> None:
    """Set the overload of every SRU node, and add the functions that the model lacks."""
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        cut = node.inputs[1]
        assert cut is not None  # noqa: S101  (for the type checker: we put it there)
        assert cut.const_value is not None  # noqa: S101  (likewise)
        straddle = bool(cut.const_value.size % node.attributes["num_groups"].as_int()) or _is_long(node.inputs[0])
        key = FunctionKey(node.op_type, straddle, mask_form, opset)
        node.overload = key.overload
        function = ir.serde.deserialize_function(function_proto(key))
        model.functions.setdefault(function.identifier(), function)
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
