"""ONNX models of single SRUs, to build engines from: cut out of an artifact, or made from reference parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx
from onnx import TensorProto, helper, numpy_helper

from scconv_deploy.graph import instrument
from scconv_deploy.graph.contract import DOMAIN, DOMAIN_VERSION, IR_VERSION, OPSETS, STRADDLE, FunctionKey, MaskForm
from scconv_deploy.graph.forms import inlined, without_functions
from scconv_deploy.graph.functions import function_proto
from scconv_deploy.graph.types import ELEMENT, FIRST_OPSET, Precision, precision_of
from scconv_deploy.runtimes.tensorrt.engine import EngineManifest
from scconv_deploy.verification.engine.sru_alone import Form
from scconv_deploy.verification.reference.run import Site

SRU_X, SRU_Y = "sru_x", "sru_y"
"""Names of the input and output of each of these models."""
_PRECISIONS: dict[str, Precision] = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def of_artifact(proto: onnx.ModelProto, site: Site, shape: Sequence[int]) -> dict[Form, bytes]:
    """Make models of one SRU from its node in an artifact.

    Args:
        proto: the artifact.
        shape: shape of x, ``[N, C, H, W]``, without open axes.

    Returns:
        The model in each form; empty if the artifact has no node of this name, or its parameters are no constants.
    """
    node = instrument.sites(proto).get(site.name)
    if node is None or (function := instrument.function_of(proto, node)) is None:
        return {}
    constants = instrument.parameters(proto, node)
    if any(name not in constants for name in node.input[1:]):
        return {}
    lone = onnx.NodeProto()
    lone.CopyFrom(node)
    lone.input[0], lone.output[0] = SRU_X, SRU_Y
    del lone.metadata_props[:]
    tensors = [constants[name] for name in dict.fromkeys(node.input[1:])]
    return _forms(lone, tensors, function, precision_of(proto), shape, list(proto.opset_import), proto.ir_version)


def of_site(
    site: Site, manifest: EngineManifest, shape: Sequence[int], mask_form: MaskForm = "where"
) -> dict[Form, bytes]:
    """Make models of one SRU from the reference's parameters, for an engine without its ONNX file.

    Args:
        manifest: manifest of the engine, for its precision.
        mask_form: ``where`` is the default form in engines.
    """
    precision = _PRECISIONS[manifest.data_type]
    opset = OPSETS[0] if precision == "fp32" else FIRST_OPSET[precision]
    function = function_proto(FunctionKey(site.operator, site.straddle, mask_form, opset))
    attributes: dict[str, Any] = dict(site.attributes)
    node = helper.make_node(
        site.operator, [SRU_X, *site.parameters], [SRU_Y], name=site.name, domain=DOMAIN, **attributes
    )
    node.overload = STRADDLE if site.straddle else ""
    tensors = [numpy_helper.from_array(value, name) for name, value in site.parameters.items()]
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, DOMAIN_VERSION)]
    return _forms(node, tensors, function, precision, shape, opsets, IR_VERSION)


def _forms(
    node: onnx.NodeProto,
    parameters: Sequence[onnx.TensorProto],
    function: onnx.FunctionProto,
    precision: Precision,
    shape: Sequence[int],
    opsets: Sequence[onnx.OperatorSetIdProto],
    ir_version: int,
) -> dict[Form, bytes]:
    element = TensorProto.FLOAT if precision == "fp32" else ELEMENT[precision]
    values = [helper.make_tensor_value_info(name, element, list(shape)) for name in (SRU_X, SRU_Y)]
    graph = helper.make_graph([node], "sru", values[:1], values[1:], initializer=list(parameters))
    whole = helper.make_model(graph, functions=[function], opset_imports=list(opsets), ir_version=ir_version)
    forms: Mapping[Form, onnx.ModelProto] = {
        "function": whole, "plugin": without_functions(whole), "inlined": inlined(whole)
    }  # fmt: skip
    return {form: model.SerializeToString(deterministic=True) for form, model in forms.items()}
