"""A float32 graph with every float32 value in float64, for an interpreter that has all operators in both types."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, inliner, numpy_helper

from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import FORMULA, FORMULA_DOMAIN

_TYPE_ATTRIBUTES = frozenset({"to", "dtype", "output_dtype"})
"""Attributes that hold the type of a node's result."""


def as_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """Copy a model with its functions inlined, its float32 values in float64.

    The result is for ``onnx.reference``: ONNX allows some operands, such as the scales of Resize, in float32 only.
    """
    copy = inliner.inline_local_functions(model)
    _widen(copy.graph)
    return copy


def with_formulas(model: onnx.ModelProto, sites: Iterable[str]) -> onnx.ModelProto:
    """Copy a model of :func:`.instrument.expose_gates`, inlined, with the gates of SRUs left to the interpreter.

    What decided the gates of a site is replaced by a node :data:`.contract.FORMULA` of the SRU's input, with an
    attribute ``site``.
    """
    wanted = set(sites)
    inputs = {instrument.gate_output(site): (site, x) for site, x in _gated(model, wanted).items()}
    copy = inliner.inline_local_functions(model)
    for node in copy.graph.node:
        decided = next((name for name in node.output if name in inputs), None)
        if decided is not None:
            site, x = inputs[decided]
            node.CopyFrom(helper.make_node(FORMULA, [x], [decided], domain=FORMULA_DOMAIN, site=site))
    copy.opset_import.append(helper.make_opsetid(FORMULA_DOMAIN, 1))
    return copy


def _gated(model: onnx.ModelProto, wanted: set[str]) -> Mapping[str, str]:
    """Input of the SRU of each of these sites whose gates are a graph output."""
    shown = {value.name for value in model.graph.output}
    return {
        site: node.input[0]
        for site, node in instrument.sites(model).items()
        if site in wanted and instrument.gate_output(site) in shown
    }


def _widen(graph: onnx.GraphProto) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for node in graph.node:
        for attribute in node.attribute:
            _widen_attribute(attribute, node.op_type)


def _widen_attribute(attribute: AttributeProto, operator: str) -> None:
    if attribute.type == AttributeProto.GRAPH:
        _widen(attribute.g)
    elif attribute.type == AttributeProto.GRAPHS:
        for graph in attribute.graphs:
            _widen(graph)
    elif attribute.type == AttributeProto.TENSOR:
        _widen_tensor(attribute.t)
    elif operator == "Constant" and attribute.name in ("value_float", "value_floats"):
        values = attribute.f if attribute.name == "value_float" else list(attribute.floats)
        attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(np.asarray(values, np.float64))))
    elif attribute.name in _TYPE_ATTRIBUTES and attribute.i == TensorProto.FLOAT:
        attribute.i = TensorProto.DOUBLE


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), name))
