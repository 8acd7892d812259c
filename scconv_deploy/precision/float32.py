"""Float32 models in the converter's form: typed values, constants as initializers, no foreign functions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper
from onnx_ir.passes import common as passes

from scconv_deploy.errors import ModelError
from scconv_deploy.graph.contract import DOMAIN
from scconv_deploy.graph.types import all_graphs as all_protos

_HALVES = {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
_INT8 = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger",
}  # fmt: skip
_FIRST_IR_WITH_FREE_INITIALIZERS = 4  # before, each initializer had to be an input as well


def as_ir(proto: onnx.ModelProto) -> ir.Model:
    """The onnx-ir model of a protobuf model; sparse initializers become dense, because onnx-ir has none."""
    if any(graph.sparse_initializer for graph in all_protos(proto.graph)):
        dense = onnx.ModelProto()
        dense.CopyFrom(proto)
        for graph in all_protos(dense.graph):
            _fill_sparse(graph)
        proto = dense
    return ir.from_proto(proto)


def typed_float32(model: ir.Model) -> ir.Model:
    """A sorted copy of a model in which every value has its type.

    Standard operators get the domain ``""``. Functions of other domains than ours are inlined. ``Constant`` nodes
    become initializers, except graph outputs; ``CastLike`` becomes ``Cast``. If all initializers are inputs too, as old
    exporters write them, they are removed from the inputs; if only some are, these stay as defaults.

    Raises:
        ModelError: the model holds half types or int8 arithmetic already, or its functions cannot be inlined.
    """
    copy = ir.from_proto(ir.to_proto(model))
    _name_standard_domain(copy)
    if any(function.domain != DOMAIN for function in copy.functions.values()):
        _inline(copy)
    proto = ir.to_proto(copy)
    _free_initializers(proto)
    with contextlib.suppress(Exception):  # onnx raises several; values without a type then stay float32, with a reason
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    found = ir.from_proto(proto)
    _fill_names(found)
    passes.TopologicalSortPass()(found)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(found)
    for node in all_nodes(found):
        if node.op_type == "CastLike" and node.domain == "" and node.outputs[0].dtype is not None:
            _to_cast(node)
    _require_float32(found)
    return found


def all_nodes(model: ir.Model) -> list[ir.Node]:
    """The nodes of the main graph and of all graphs in it, a node before those of its own graphs."""
    return list(ir.traversal.RecursiveGraphIterator(model.graph))


def all_graphs(model: ir.Model) -> list[ir.Graph]:
    """The main graph, and the graphs that nodes hold."""
    return [model.graph, *(graph for node in all_nodes(model) for graph in graphs_of(node))]


def graphs_of(node: ir.Node) -> list[ir.Graph]:
    """The graphs that a node holds: branches of If, bodies of Loop and Scan."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            found.append(attribute.as_graph())
        elif attribute.type == ir.AttributeType.GRAPHS:
            found += attribute.as_graphs()
    return found


def is_tensor(value: ir.Value) -> bool:
    """Whether a value is no sequence, no optional and no sparse tensor; one of unknown type counts as a tensor."""
    return value.type is None or isinstance(value.type, ir.TensorType)


def _name_standard_domain(model: ir.Model) -> None:
    """Rename the standard domain ``ai.onnx`` to its shorter name, ""."""
    if "ai.onnx" in model.opset_imports:
        version = model.opset_imports.pop("ai.onnx")
        model.opset_imports.setdefault("", version)
    for node in all_nodes(model):
        if node.domain == "ai.onnx":
            node.domain = ""


def _inline(model: ir.Model) -> None:
    try:
        passes.InlinePass(criteria=lambda function: function.domain != DOMAIN)(model)
    except Exception as error:  # onnx-ir raises ValueError and its own
        domains = ", ".join(sorted({f.domain for f in model.functions.values()} - {DOMAIN}))
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"The model's functions of {domains} cannot be inlined: {reason}", "Export it without functions."
        ) from error


def _fill_sparse(graph: onnx.GraphProto) -> None:
    for sparse in graph.sparse_initializer:
        values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
        dense = np.zeros(list(sparse.dims), values.dtype)
        if indices.ndim == 1:
            dense.reshape(-1)[indices] = values
        else:
            dense[tuple(indices.T)] = values
        graph.initializer.append(numpy_helper.from_array(dense, sparse.values.name))
    del graph.sparse_initializer[:]


def _free_initializers(proto: onnx.ModelProto) -> None:
    graph = proto.graph
    given = {value.name for value in graph.input}
    stored = {tensor.name for tensor in graph.initializer}
    if stored and stored <= given:
        kept = [value for value in graph.input if value.name not in stored]
        del graph.input[:]
        graph.input.extend(kept)
        proto.ir_version = max(proto.ir_version, _FIRST_IR_WITH_FREE_INITIALIZERS)


def _fill_names(model: ir.Model) -> None:
    """Name the values without a name, such as a node's optional outputs."""
    taken = {value.name for value in _values(model)}
    for value in _values(model):
        if not value.name and list(value.uses()):
            value.name = next(name for i in range(len(taken) + 1) if (name := f"value_{i}") not in taken)
            taken.add(value.name)


def _to_cast(node: ir.Node) -> None:
    dtype = node.outputs[0].dtype
    assert dtype is not None  # noqa: S101  (for the type checker: the caller looked)
    node.resize_inputs(1)
    node.op_type = "Cast"
    node.attributes.pop("saturate", None)  # for float8 only
    node.attributes["to"] = ir.AttrInt64("to", int(dtype))


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in all_graphs(model):
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _require_float32(model: ir.Model) -> None:
    for value in _values(model):
        if value.dtype in _HALVES:
            raise ModelError(
                f"{value.name} is {value.dtype}: this model is in half precision already, at least in part.",
                "Convert the float32 one.",
            )
    quantised = next((n for n in all_nodes(model) if n.op_type in _INT8 and n.domain in ("", "com.microsoft")), None)
    if quantised is not None:
        raise ModelError(
            f"{quantised.name or quantised.outputs[0].name} is a {quantised.op_type}: this model is int8 (Q/DQ) "
            "already, and half scales would change its codes.",
            "Convert the float32 one.",
        )
