"""SRU nodes: their attributes, and the functions that a graph with such nodes needs."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from scconv_deploy.gate.variant import GateVariant
from scconv_deploy.rewrite.functions import (
    DOMAIN,
    DOMAIN_VERSION,
    FunctionKey,
    MaskForm,
    function_proto,
    node_attributes,
)

SITE = "scconv.site"
VARIANT = "scconv.variant"
REWRITTEN = "scconv_deploy.rewritten"
"""Metadata of a model: the sites (JSON) that were read from the graph, for recognition knew no module for them."""


def variant_attributes(variant: GateVariant) -> dict[str, Any]:
    """The attributes of a variant's node."""
    return node_attributes(variant.num_groups, variant.ddof, variant.eps_var, variant.eps_std)


def add_functions(model: ir.Model, mask_form: MaskForm, opset: int) -> None:
    """Give every SRU node its overload and the model the functions that it lacks."""
    for node in model.graph:
        if node.domain != DOMAIN:
            continue
        cut = node.inputs[1]
        assert cut is not None  # noqa: S101  (for the type checker: we put it there)
        assert cut.const_value is not None  # noqa: S101  (likewise)
        straddle = bool(cut.const_value.size % node.attributes["num_groups"].as_int())
        key = FunctionKey(node.op_type, straddle, mask_form, opset)
        node.overload = key.overload
        function = ir.serde.deserialize_function(function_proto(key))
        model.functions.setdefault(function.identifier(), function)
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
