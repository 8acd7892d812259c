"""An ONNX model in memory as a :class:`.network_source.NetworkSource`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import onnx

from scconv_deploy.errors import ModelError
from scconv_deploy.exporters.network_source import Form, GraphFacts, SRUNode
from scconv_deploy.rewrite.forms import inlined, without_functions
from scconv_deploy.rewrite.functions import DOMAIN, STANDARD_DOMAINS
from scconv_deploy.rewrite.unknown import with_inner


@dataclass(frozen=True, eq=False)
class OnnxSource:
    """A model with its external data loaded; what it holds is read once."""

    model: onnx.ModelProto

    @cached_property
    def facts(self) -> GraphFacts:
        return graph_facts(self.model)

    @cached_property
    def content_sha256(self) -> str:
        return hashlib.sha256(self.model.SerializeToString(deterministic=True)).hexdigest()

    def read(self, form: Form) -> bytes:
        """Serialised (ModelError beyond protobuf's 2 GiB)."""
        given = {"whole": lambda model: model, "plugin": without_functions, "inlined": inlined}[form](self.model)
        try:
            return given.SerializeToString()
        except ValueError as error:  # protobuf's limit
            raise ModelError("The model is larger than 2 GiB.", "Split it.") from error


def graph_facts(model: onnx.ModelProto) -> GraphFacts:
    """What a builder must know of a model."""
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: _shape(value) for value in model.graph.input if value.name not in constants}
    srus = tuple(SRUNode(n.name or n.output[0], n.op_type) for n in model.graph.node if n.domain == DOMAIN)
    nodes = [node for graph in (model.graph, *model.functions) for node in with_inner(graph.node)]
    operators = tuple(sorted({(node.domain, node.op_type) for node in nodes}))
    defined = {(function.domain, function.name) for function in model.functions}
    undefined = tuple(o for o in operators if o[0] not in STANDARD_DOMAINS and o not in defined)
    return GraphFacts(inputs, srus, operators, undefined)


def _shape(value: onnx.ValueInfoProto) -> tuple[int, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
