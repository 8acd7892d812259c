"""The artifact's own SRU functions with their gates laid open: read them, or replace them.

Both work on copies of the artifact's function bodies, so that what is tested is what was shipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from scconv_deploy.rewrite.functions import DOMAIN, OPEN

_INJECTED = "sru__injected"
PROBE_X, _PROBE_Y, PROBE_OPEN = "scconv_probe::x", "scconv_probe::y", "scconv_probe::open"
"""Input and outputs of :func:`gate_probe`; no initializer of a user's file has such a name."""


def sites(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The SRU nodes of a model by name (their module in PyTorch), in the graph's order."""
    found = [node for node in model.graph.node if node.domain == DOMAIN]
    return {node.name or node.output[0]: node for node in found}


def function_of(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.FunctionProto | None:
    """The function that gives a node its meaning."""
    for function in model.functions:
        if (function.domain, function.name, function.overload) == (node.domain, node.op_type, node.overload):
            return function
    return None


def parameters(model: onnx.ModelProto, node: onnx.NodeProto) -> dict[str, onnx.TensorProto]:
    """The constants among a node's inputs (initializers, Constant nodes, either behind Identity), by input name."""
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    producers = {n.output[0]: n for n in model.graph.node if n.op_type in ("Constant", "Identity") and n.output}
    found = {}
    for name in node.input[1:]:
        source = name
        while source in producers and producers[source].op_type == "Identity":
            source = producers[source].input[0]
        constant = producers.get(source)
        value = by_name.get(source)
        if value is None and constant is not None and constant.op_type == "Constant":
            value = next((a.t for a in constant.attribute if a.name == "value"), None)
        if value is not None:
            found[name] = onnx.TensorProto()
            found[name].CopyFrom(value)
            found[name].name = name
    return found


def mask_input(site: str) -> str:
    """The graph input through which :func:`with_injected_masks` takes a site's gates."""
    return f"{site}::open"


def with_injected_masks(model: onnx.ModelProto, wanted: Sequence[str]) -> onnx.ModelProto:
    """A copy whose SRUs take their gates from graph inputs (bool ``[N, C, H, W]``, see :func:`mask_input`)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    replaced: dict[tuple[str, str], onnx.FunctionProto] = {}
    for site, node in sites(copy).items():
        if site not in wanted:
            continue
        key = (node.op_type, node.overload)
        if key not in replaced:
            function = function_of(copy, node)
            if function is None or not _has_open(function):
                continue
            replaced[key] = _injected(function)
        node.op_type = replaced[key].name
        node.input.append(mask_input(site))
        copy.graph.input.append(helper.make_tensor_value_info(mask_input(site), TensorProto.BOOL, [None] * 4))
    copy.functions.extend(replaced.values())
    return copy


def gate_probe(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.ModelProto | None:
    """A model of one SRU alone: its x in, its y and its gates (bool) out; None if its body hides them."""
    function = function_of(model, node)
    if function is None or not _has_open(function):
        return None
    opened = onnx.FunctionProto()
    opened.CopyFrom(function)
    opened.output.append(OPEN)
    probe = onnx.NodeProto()
    probe.CopyFrom(node)
    del probe.input[:], probe.output[:]
    probe.input.extend([PROBE_X, *node.input[1:]])
    probe.output.extend([_PROBE_Y, PROBE_OPEN])
    float_type = TensorProto.FLOAT
    graph = helper.make_graph(
        [probe],
        "gate_probe",
        [helper.make_tensor_value_info(PROBE_X, float_type, [None] * 4)],
        [
            helper.make_tensor_value_info(_PROBE_Y, float_type, [None] * 4),
            helper.make_tensor_value_info(PROBE_OPEN, TensorProto.BOOL, [None] * 4),
        ],
        initializer=list(parameters(model, node).values()),
    )
    return helper.make_model(
        graph, functions=[opened], opset_imports=list(model.opset_import), ir_version=model.ir_version
    )


def attributes(node: onnx.NodeProto) -> Mapping[str, object]:
    """A node's attributes as Python values; strings decoded."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in values.items()}


def _has_open(function: onnx.FunctionProto) -> bool:
    return any(OPEN in node.output for node in function.node)


def _injected(function: onnx.FunctionProto) -> onnx.FunctionProto:
    copy = onnx.FunctionProto()
    copy.CopyFrom(function)
    copy.name = f"{function.name}Injected"
    copy.input.append(_INJECTED)
    for node in copy.node:
        for index, name in enumerate(node.input):
            if name == OPEN:
                node.input[index] = _INJECTED
    return copy
