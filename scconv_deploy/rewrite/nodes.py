"""SRU nodes: their parameters, and the functions that a graph with such nodes needs."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from scconv_deploy.gate import GateParameters, gate_parameters
from scconv_deploy.gate.variant import GateVariant, gate_weight
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


def node_parameters(
    variant: GateVariant, gamma: Tensor, beta: Tensor, gate: GateParameters | None = None
) -> dict[str, Tensor]:
    """The parameters of an SRU's node in the operator's order, float32 ``[C]`` each.

    Args:
        gamma, beta: C elements each, of any shape.
        gate: theirs, where it is known already.

    Raises:
        ModelError: no gate is defined, see :func:`.gate_parameters`.
    """
    found = gate_parameters(gamma, beta, variant) if gate is None else gate
    gamma, beta = gamma.detach().reshape(-1), beta.detach().reshape(-1)
    inputs = {"cut": torch.as_tensor(found.cut), "sign": torch.as_tensor(found.sign)}
    if variant.operator == "SRUNorm":
        inputs |= {"gamma": gamma.clone(), "beta": beta.clone()}
    elif variant.operator == "SRUSoft":
        weight = gate_weight(gamma, variant).double()
        inputs |= {"scale": (gamma.double() * weight).float(), "shift": (beta.double() * weight).float()}
    return inputs


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
