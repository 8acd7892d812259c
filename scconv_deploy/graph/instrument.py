"""SRU nodes of an ONNX model: their parameters and functions; their gates exposed as outputs or injected as inputs.

Gates are exposed and injected in copies of the artifact's function bodies, so that the shipped bodies are tested.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx
from onnx import TensorProto, helper

from scconv_deploy.graph.contract import DOMAIN, GATED, MODULE, OPEN, mask_input
from scconv_deploy.graph.types import ELEMENT, half_in

_INJECTED = "sru__injected"
PROBE_X, PROBE_Y, PROBE_OPEN = "scconv_probe::x", "scconv_probe::y", "scconv_probe::open"
"""Input and outputs of :func:`gate_probe`; no initializer of a user's file has such a name."""


def sites(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The SRU nodes of a model by name (their module in PyTorch), in the graph's order."""
    found = [node for node in model.graph.node if node.domain == DOMAIN]
    return {site_of(node): node for node in found}


def site_of(node: onnx.NodeProto) -> str:
    """The name of an SRU node's site: the node's name, or its output's."""
    return node.name or node.output[0]


def function_of(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.FunctionProto | None:
    """The model-local function of a node; None without one."""
    for function in model.functions:
        if (function.domain, function.name, function.overload) == (node.domain, node.op_type, node.overload):
            return function
    return None


def parameters(model: onnx.ModelProto, node: onnx.NodeProto) -> dict[str, onnx.TensorProto]:
    """Constants among a node's inputs by input name: initializers or Constant nodes, also behind Identity."""
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


def gate_input(site: str) -> str:
    """The graph output of :func:`expose_gates` that holds the input of a site's gates."""
    return f"{site}::x"


def gate_output(site: str) -> str:
    """The graph output of :func:`expose_gates` that holds a site's gates as the artifact decides them."""
    return f"{site}::decided"


def module_of(node: onnx.NodeProto) -> str:
    """The path in PyTorch of the module that a node belongs to; "" if the file does not say."""
    return metadata_of(node, MODULE)


def metadata_of(node: onnx.NodeProto, key: str) -> str:
    """A node's metadata under a key; "" without."""
    return next((entry.value for entry in node.metadata_props if entry.key == key), "")


def expose_gates(model: onnx.ModelProto, wanted: Sequence[str]) -> onnx.ModelProto:
    """Copy a model with the gates of SRUs (:func:`gate_output`) and their input (:func:`gate_input`) as graph outputs.

    Args:
        wanted: sites; those without a node, or whose function body has no :data:`.contract.OPEN`, are left as they are.
    """
    copy, changed = _with_bodies(model, wanted, lambda function: _opened(function, *_shown(function)))
    for site, (node, function) in changed.items():
        node.output.append(gate_output(site))
        copy.graph.output.append(helper.make_tensor_value_info(gate_output(site), TensorProto.BOOL, [None] * 4))
        _show_input(copy, site, node, function)
    return copy


def inject_gates(model: onnx.ModelProto, wanted: Sequence[str], values: Sequence[str] = ()) -> onnx.ModelProto:
    """Copy a model so that SRUs take their gates from graph inputs (:func:`mask_input`, bool ``[N, C, H, W]``).

    The gates' own input is a graph output (:func:`gate_input`).

    Args:
        wanted: sites, as in :func:`expose_gates`.
        values: further values that become graph outputs under their own names.
    """
    copy, changed = _with_bodies(model, wanted, _injected)
    for site, (node, function) in changed.items():
        node.input.append(mask_input(site))
        copy.graph.input.append(helper.make_tensor_value_info(mask_input(site), TensorProto.BOOL, [None] * 4))
        _show_input(copy, site, node, function)
    known = {value.name for value in copy.graph.output}
    copy.graph.output.extend(onnx.ValueInfoProto(name=value) for value in values if value not in known)
    return copy


def _with_bodies(
    model: onnx.ModelProto, wanted: Sequence[str], change: Callable[[onnx.FunctionProto], onnx.FunctionProto]
) -> tuple[onnx.ModelProto, dict[str, tuple[onnx.NodeProto, onnx.FunctionProto]]]:
    """A copy in which the nodes of these sites call changed functions, and those nodes and functions by site."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    replaced: dict[tuple[str, str], onnx.FunctionProto] = {}
    found = {}
    for site, node in sites(copy).items():
        if site not in wanted:
            continue
        key = (node.op_type, node.overload)
        if key not in replaced:
            function = function_of(copy, node)
            if function is None or not _has_open(function):
                continue
            replaced[key] = change(function)
        node.op_type = replaced[key].name
        found[site] = node, replaced[key]
    copy.functions.extend(replaced.values())
    return copy, found


def _show_input(model: onnx.ModelProto, site: str, node: onnx.NodeProto, function: onnx.FunctionProto) -> None:
    if len(function.output) > len(node.output):
        node.output.append(gate_input(site))
    else:  # a value of its own: the input may be a graph input or output already
        model.graph.node.append(helper.make_node("Identity", [node.input[0]], [gate_input(site)]))
    model.graph.output.append(onnx.ValueInfoProto(name=gate_input(site)))


def gate_probe(model: onnx.ModelProto, node: onnx.NodeProto) -> onnx.ModelProto | None:
    """A model of one SRU alone with x as input, y and the gate mask (bool) as outputs; x and y have the data's type.

    None if the function body has no :data:`.contract.OPEN`, or a parameter is not a constant.
    """
    function = function_of(model, node)
    stored = parameters(model, node)
    if function is None or not _has_open(function) or any(name not in stored for name in node.input[1:]):
        return None
    opened = _opened(function)
    probe = onnx.NodeProto()
    probe.CopyFrom(node)
    probe.op_type = opened.name
    del probe.input[:], probe.output[:]
    probe.input.extend([PROBE_X, *node.input[1:]])
    probe.output.extend([PROBE_Y, PROBE_OPEN])
    half = half_in(model)
    float_type = TensorProto.FLOAT if half is None else ELEMENT[half]
    graph = helper.make_graph(
        [probe],
        "gate_probe",
        [helper.make_tensor_value_info(PROBE_X, float_type, [None] * 4)],
        [
            helper.make_tensor_value_info(PROBE_Y, float_type, [None] * 4),
            helper.make_tensor_value_info(PROBE_OPEN, TensorProto.BOOL, [None] * 4),
        ],
        initializer=list(stored.values()),
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


def _opened(function: onnx.FunctionProto, *further: str) -> onnx.FunctionProto:
    copy = onnx.FunctionProto()
    copy.CopyFrom(function)
    copy.name = f"{function.name}Opened"
    copy.output.extend([OPEN, *further])
    return copy


def _shown(function: onnx.FunctionProto) -> list[str]:
    return [GATED] if any(GATED in node.output for node in function.node) else []


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
