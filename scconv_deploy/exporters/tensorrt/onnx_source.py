"""An ONNX model in memory as a :class:`.source.NetworkSource`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import onnx
from onnx import TensorProto

from scconv_deploy.errors import BuildError, ModelError
from scconv_deploy.exporters.tensorrt.source import Form, GraphFacts, GraphInput, SRUNode
from scconv_deploy.graph.contract import DOMAIN, STANDARD_DOMAINS
from scconv_deploy.graph.forms import folded, inlined, without_foreign_functions, without_functions
from scconv_deploy.graph.hygiene import straddling_first
from scconv_deploy.graph.quantizer_forms import why_not_for_tensorrt, with_float_biases
from scconv_deploy.graph.unknown import with_inner
from scconv_deploy.system.environment import sha256_of

_FLOATING = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_QUANTIZE = "scconv-deploy quantize F.onnx -o G.onnx --data SOURCE"
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_INTEGERS = tuple(map(TensorProto.DataType.Value, ("INT8", "UINT8")))
_READS_SETTINGS = ("Resize", "Upsample", "QuantizeLinear", "DequantizeLinear")
"""Operators whose inputs after the first are sizes or scales."""


@dataclass(frozen=True, eq=False)
class OnnxSource:
    """A model with its external data loaded; its facts are read once.

    NVIDIA's parser binds a function's inputs wrongly where a formal name equals an outer tensor's, so functions of
    other domains are expanded. Of two functions with one name it takes the first, so our straddling one stands first.
    It dequantises no int32, so biases that are stored so become float.
    """

    model: onnx.ModelProto

    @cached_property
    def readable(self) -> onnx.ModelProto:
        """The model in the form that parsers read correctly.

        Raises:
            ModelError: a function cannot be expanded.
            BuildError: its codes are not those of TensorRT, which has signed ones without zero points.
        """
        if why := why_not_for_tensorrt(self.model):
            raise BuildError(f"{why[0].upper()}{why[1:]}.", f"Quantise the float file for it: {_QUANTIZE}.")
        readable = without_foreign_functions(self.model)
        if readable is self.model:
            readable = onnx.ModelProto()
            readable.CopyFrom(self.model)
        straddling_first(readable)
        with_float_biases(readable)
        return readable

    @cached_property
    def facts(self) -> GraphFacts:
        return graph_facts(self.readable)

    @cached_property
    def content_sha256(self) -> str:
        return sha256_of(self.readable.SerializeToString(deterministic=True))

    @cached_property
    def structure_sha256(self) -> str:
        """SHA-256 of everything that weights of the same names, shapes and types leave as it is."""
        return sha256_of(_skeleton(self.readable).SerializeToString(deterministic=True))

    def proto(self, form: Form) -> onnx.ModelProto:
        """The model in a form (ModelError: a node has no function to expand)."""
        return {"whole": lambda model: model, "plugin": without_functions, "inlined": inlined}[form](self.readable)

    def read(self, form: Form) -> bytes:
        """The model's bytes in a form (ModelError beyond protobuf's 2 GiB)."""
        return _bytes(self.proto(form))

    def folded(self, form: Form) -> bytes | None:
        """The bytes with all constants folded, because parsers need constant axes and shapes; None if that fails."""
        model = folded(self.readable)
        return None if model is None else OnnxSource(model).read(form)


def _skeleton(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy without the values of its weights, and without names that an exporter numbers anew in each export.

    Scalars and sizes are no weights: parsers read them when they build, so no refit replaces them.
    """
    copy, graph = onnx.ModelProto(), model.graph
    copy.opset_import.extend(model.opset_import)
    copy.functions.extend(model.functions)
    for field in ("node", "input", "output"):
        getattr(copy.graph, field).extend(getattr(graph, field))
    settings = {name for node in graph.node if node.op_type in _READS_SETTINGS for name in node.input[1:]}
    names = {value.name: value.name for value in (*graph.input, *graph.output)} | {"": ""}
    for tensor in graph.initializer:
        if tensor.data_type in _FLOATING and tensor.dims and tensor.name not in settings:
            names[tensor.name] = tensor.name
            copy.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        else:
            kept = copy.graph.initializer.add()
            kept.CopyFrom(tensor)
            kept.name = names.setdefault(tensor.name, f"%{len(names)}")
    for node in copy.graph.node:
        for field in ("name", "doc_string", "metadata_props"):
            node.ClearField(field)
        for values in (node.input, node.output):
            values[:] = [names.setdefault(name, f"%{len(names)}") for name in values]
    return copy


def _bytes(model: onnx.ModelProto) -> bytes:
    try:
        return model.SerializeToString()
    except ValueError as error:  # protobuf's limit
        raise ModelError("The model is larger than 2 GiB.", "Split it.") from error


def graph_facts(model: onnx.ModelProto) -> GraphFacts:
    """The facts of a model that a builder needs."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = tuple(GraphInput(v.name, _shape(v)) for v in model.graph.input if v.name not in constants)
    srus = tuple(
        SRUNode(n.name or n.output[0], n.op_type, n.input[0], n.output[0])
        for n in model.graph.node
        if n.domain == DOMAIN
    )
    nodes = [node for graph in (model.graph, *model.functions) for node in with_inner(graph.node)]
    operators = tuple(sorted({(node.domain, node.op_type) for node in nodes}))
    defined = {(function.domain, function.name) for function in model.functions}
    undefined = tuple(o for o in operators if o[0] not in STANDARD_DOMAINS and o not in defined)
    return GraphFacts(inputs, srus, operators, undefined, tuple(_with_integer_weights(model.graph)))


def _with_integer_weights(graph: onnx.GraphProto) -> Iterator[str]:
    """Names, as NVIDIA's parser has them, of nodes whose weights are a DequantizeLinear of a constant.

    Its integers are stored, or a QuantizeLinear makes them of a float initializer.
    """
    stored = {tensor.name for tensor in graph.initializer if tensor.data_type in _INTEGERS}
    floats = {tensor.name for tensor in graph.initializer} - stored
    stored |= {n.output[0] for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] in floats}
    weights = {n.output[0] for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored}
    for node in graph.node:
        if node.op_type in _LAYERS and node.input[1] in weights:
            yield node.name or f"node_of_{node.output[0]}"


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
