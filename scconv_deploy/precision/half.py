"""Convert an ONNX model to float16 or bfloat16: data in half, gates and sensitive operators in float32.

Every node gets one type. A value that nodes of the other type read gets one Cast for all of them. An SRU takes its data
in half and its parameters in float32; its function computes statistics and gates in float32. Graphs inside a node
(branches, loop bodies) are converted like the main graph; their inputs and outputs are float32.

The finished float32 graph is converted, not the module: its BatchNorms are folded into convolutions in float32 already
(in half, a small running variance rounds to 0), and graphs of all exporters are treated alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from scconv_deploy.errors import ModelError
from scconv_deploy.graph.contract import DOMAIN
from scconv_deploy.graph.types import FIRST_OPSET, LARGEST, PRECISION, UNIT_ROUNDOFF, HalfPrecision, IoTypes
from scconv_deploy.precision.float32 import all_graphs, all_nodes, graphs_of, is_tensor, typed_float32
from scconv_deploy.precision.patterns import matching, require_matches
from scconv_deploy.precision.protected import COORDINATES, protected

DTYPES: dict[str, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

KEPT_OPERATORS: dict[str, str] = {
    "Softmax": "exponentials and their sum",
    "LogSoftmax": "exponentials and their sum",
    "ReduceSum": "a sum of many terms",
    "ReduceMean": "a sum of many terms",
    "ReduceSumSquare": "a sum of squares overflows float16 at 256",
    "ReduceL2": "a sum of squares overflows float16 at 256",
    "GlobalAveragePool": "a sum of many terms",
    "LayerNormalization": "statistics",
    "GroupNormalization": "statistics",
    "InstanceNormalization": "statistics",
    "RMSNormalization": "statistics",
    "MeanVarianceNormalization": "statistics",
    "LpNormalization": "statistics",
    "CumSum": "a sum of many terms",
    "GlobalLpPool": "a sum of many terms",
    "ReduceL1": "a sum of many terms",
    "ReduceLogSum": "a sum of many terms",
    "ReduceLogSumExp": "exponentials and their sum",
    "ReduceProd": "a product of many terms",
    "RandomNormalLike": "other numbers are drawn in half",
    "RandomUniformLike": "other numbers are drawn in half",
    "Exp": "overflows float16 at 11.1",
    "Pow": "overflows float16 at 256 squared",
}
"""Operators that stay in float32, and why.

Measured (``python -m benchmarks half_keep``): rounding their results costs nothing; a runtime that also sums in half
gets the means of ScConv-ResNet-50 wrong by up to 2 % in float16 and 73 % in bfloat16. Softmax costs no further cast, as
it stands between a kept mean and a product. Reasons that name a range follow from the type.
"""

_WORST_CONSTANT = 4.0  # relative error in unit roundoffs beyond which a constant counts as lost in half
_AS_LARGE = "its values may be as large as those of"
_CARRYING = {
    "Add", "Sub", "Where", "Max", "Min", "Sum", "Neg", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze",
    "Expand", "Concat", "Slice", "Split", "Gather", "Flatten", "Tile",
}  # fmt: skip
"""Operators that pass on values beyond half's range, usually to a Softmax: masks of -3.4e38."""

_TYPE_ATTRIBUTES = ("dtype", "output_datatype")


@dataclass(frozen=True)
class HalfOptions:
    """Settings of a conversion to half precision.

    Attributes:
        precision: ``fp16`` or ``bf16``.
        io: type of the graph's inputs and outputs; ``half`` saves casts where the host has half data.
        keep: patterns (``*`` and ``?``) of nodes, weights or values that stay in float32.
    """

    precision: HalfPrecision
    io: IoTypes = "float32"
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Conversion:
    """A converted model.

    Attributes:
        half: number of nodes that compute in half.
        kept: (node, why it stays in float32).
        casts: number of inserted casts.
    """

    model: ir.Model
    half: int
    kept: tuple[tuple[str, str], ...]
    casts: int


def converted(model: ir.Model, options: HalfOptions) -> Conversion:
    """Convert a copy of a model by :func:`to_half`, and write the options into its metadata."""
    conversion = to_half(model, options)
    if not conversion.half and not conversion.casts:
        return conversion  # it is still the float32 model
    conversion.model.metadata_props[PRECISION] = json.dumps(
        {"precision": options.precision, "io": options.io, "keep": list(options.keep)}
    )
    return conversion


def to_half(model: ir.Model, options: HalfOptions) -> Conversion:
    """Convert a copy of a float32 model.

    Raises:
        ModelError: its opset is too low for the type; it holds half types or int8 arithmetic already; or its functions
            cannot be inlined.
        UsageError: a pattern of ``keep`` matches nothing.
    """
    float32_model = typed_float32(model)
    opset, first = float32_model.opset_imports.get(""), FIRST_OPSET[options.precision]
    if opset is None or opset < first:
        why = ", from which convolutions take it" if options.precision == "bf16" else ""
        raise ModelError(
            f"The model has opset {opset or 'none'}; {options.precision} needs {first}{why}.",
            f"Export it with --opset {first}, or run scconv-deploy rewrite IN.onnx -o OUT.onnx --opset {first}.",
        )
    conversion = _Conversion(float32_model, opset, options)
    conversion.run()
    return Conversion(float32_model, conversion.half, tuple(conversion.kept), conversion.casts)


class _Conversion:
    """One conversion and its state; :meth:`run` converts the model in place.

    Every value gets one type. A node in half has those float inputs and outputs in half that follow the type of its
    data. A cast stands right behind the value that it converts, in the value's own graph.
    """

    def __init__(self, model: ir.Model, opset: int, options: HalfOptions) -> None:
        self._model, self._opset, self._options = model, opset, options
        self._dtype = DTYPES[options.precision]
        self._graphs, self._nodes = all_graphs(model), all_nodes(model)
        self._protected = protected(model)
        values = list(self._values())
        self._floats = {v for v in values if v.dtype == ir.DataType.FLOAT and is_tensor(v)}
        self._value_names = {v.name for v in values}
        self._node_names = {node.name for node in self._nodes}
        self._in_type: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._large: dict[ir.Value, str] = {}
        self.kept: list[tuple[str, str]] = []
        self.half = self.casts = 0

    def run(self) -> None:
        require_matches("--keep", self._options.keep, self._nodes)
        in_half = {node: self._computes_in_half(node) for node in self._nodes}
        for node, half in in_half.items():
            if half:
                self._type_outputs(node)
        if self._options.io == "half":
            self._type_graph_inputs()
        for node, half in in_half.items():
            self._connect(node, half)
        for graph in self._graphs:
            self._type_graph_outputs(graph)
        self._drop_replaced_constants()

    def _values(self) -> Iterator[ir.Value]:
        for graph in self._graphs:
            yield from graph.inputs
            yield from graph.initializers.values()
            for node in graph:
                yield from node.outputs

    # --- which nodes -------------------------------------------------------------------------------------------

    def _computes_in_half(self, node: ir.Node) -> bool:
        """Whether a node computes in half; count it, or note why it stays in float32."""
        values = [v for v in (*node.inputs, *node.outputs) if v is not None]
        if not any(v in self._floats for v in values) and not graphs_of(node):
            return False
        reason = self._reason(node)
        if "overflows half" in reason or reason.startswith(_AS_LARGE):
            self._large |= dict.fromkeys(node.outputs, node.outputs[0].name or node.op_type)
        if reason:
            self.kept.append((node.name or node.outputs[0].name or node.op_type, f"{node.op_type}: {reason}"))
            return False
        self.half += any(output in self._floats for output in node.outputs)
        return True

    def _reason(self, node: ir.Node) -> str:
        """The reason if a node stays in float32, else empty."""
        pattern = matching(node, self._options.keep)
        if pattern:
            return f"kept by {pattern!r}"
        if graphs_of(node):
            return "the inputs and outputs of its graphs are float32"
        if node in self._protected.nodes:
            return self._protected.nodes[node]
        if node.domain == DOMAIN:
            return ""
        if node.domain != "":
            return f"the domain {node.domain} is not known to take half"
        if not all(is_tensor(v) for v in (*node.inputs, *node.outputs) if v is not None):
            return "it works on a sequence or an optional"
        unknown = next((v for v in (*node.inputs, *node.outputs) if v is not None and v.name and v.dtype is None), None)
        if unknown is not None:
            return f"the type of {unknown.name} is not known"
        if node.op_type == "Constant" or self._type_is_attribute(node):
            return "its type is an attribute"
        if node.op_type in KEPT_OPERATORS:
            return KEPT_OPERATORS[node.op_type]
        if node.op_type == "Concat" and _between_kept(node):
            return "it joins values of float32 for readers in float32"
        if not self._schema_allows(node):
            return "the operator has no half type"
        if why := next((why for v in self._variable_inputs(node) if (why := self._bad_constant(v, node))), ""):
            return why
        large = next((self._large[v] for v in node.inputs if v in self._large), "")
        return f"{_AS_LARGE} {large}" if large and node.op_type in _CARRYING else ""

    def _type_is_attribute(self, node: ir.Node) -> bool:
        """Whether an attribute, given or by default, sets the type of the result."""
        known = onnx.defs.get_schema(node.op_type, self._opset, "").attributes
        defaults = [name for name in _TYPE_ATTRIBUTES if name in known and known[name].default_value.name]
        return any(name in node.attributes for name in _TYPE_ATTRIBUTES) or bool(defaults)

    def _schema_allows(self, node: ir.Node) -> bool:
        """Whether some float input or output has a type that may be half."""
        schema = onnx.defs.get_schema(node.op_type, self._opset, "")
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        wanted = f"tensor({'float16' if self._options.precision == 'fp16' else 'bfloat16'})"
        variables = [f.type_str for f in (*schema.inputs, *schema.outputs) if f.type_str in allowed]
        own = {schema.inputs[i].type_str for i in COORDINATES.get(node.op_type, ()) if i < len(schema.inputs)}
        data = schema.outputs[0].type_str
        of_floats = [t for t in variables if "tensor(float)" in allowed[t] and (t == data or t not in own)]
        return bool(of_floats) and all(wanted in allowed[t] for t in of_floats)

    def _bad_constant(self, value: ir.Value, node: ir.Node) -> str:
        """What half would do to a constant beyond rounding; empty for nothing. Infinity stays infinity in half."""
        if not _is_constant(value) or value.const_value is None:
            return ""
        array = value.const_value.numpy().astype(np.float64)
        finite = array[np.isfinite(array)]
        if np.abs(finite).max(initial=0.0) > LARGEST[self._options.precision]:
            if node.op_type == "Clip":  # a bound beyond half's range becomes infinity: neither limits half data
                return ""
            return f"the constant {value.name} overflows half: {np.abs(finite).max():.3g}"
        rounded = finite.astype(self._dtype.numpy()).astype(np.float64)
        error, norm = np.linalg.norm(rounded - finite), np.linalg.norm(finite)
        if error > _WORST_CONSTANT * UNIT_ROUNDOFF[self._options.precision] * norm:
            return f"the constant {value.name} vanishes in half: {np.abs(finite[finite != 0]).max():.3g}"
        if (finite == np.round(finite)).all() and len(np.unique(rounded)) < len(np.unique(finite)):
            return f"the constant {value.name} holds integers that half rounds: up to {np.abs(finite).max():.5g}"
        return ""

    # --- types -------------------------------------------------------------------------------------------------

    def _variable_inputs(self, node: ir.Node) -> list[ir.Value]:
        """The float inputs whose type follows that of the node's data."""
        return [v for i, v in enumerate(node.inputs) if v is not None and v in self._floats and self._follows(node, i)]

    def _follows(self, node: ir.Node, index: int) -> bool:
        """Whether an input has the type of the node's data; parameters of gates, coordinates and fixed types do not.

        A coordinate of the data's own type, as in RoiAlign, keeps its node in float32, so it does not come here.
        """
        if node.domain == DOMAIN:
            return index == 0
        schema = onnx.defs.get_schema(node.op_type, self._opset, "")
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        is_variable = formal.type_str in {c.type_param_str for c in schema.type_constraints}
        return is_variable and index not in COORDINATES.get(node.op_type, ())

    def _type_graph_inputs(self) -> None:
        """Make graph inputs half, except those that become indices, sizes and the like."""
        for value in self._model.graph.inputs:
            if value in self._protected.inputs:
                self.kept.append((value.name or "input", f"input: {self._protected.inputs[value]}"))
            elif value in self._floats:
                value.dtype = self._dtype
                if value.const_value is not None:  # a default
                    tensor = value.const_value.numpy().astype(self._dtype.numpy())
                    value.const_value = ir.Tensor(tensor, name=value.name)

    def _type_outputs(self, node: ir.Node) -> None:
        for index, output in enumerate(node.outputs):
            if output in self._floats and self._output_follows(node, index):
                output.dtype = self._dtype
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(self._dtype))
        if node.op_type == "ConstantOfShape":  # without a value it is a float32 zero
            given = node.attributes.get("value")
            array = np.zeros(1, np.float32) if given is None else given.as_tensor().numpy()
            if array.dtype == np.float32:
                with np.errstate(over="ignore"):
                    half = array.astype(self._dtype.numpy())
                node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(half))

    def _output_follows(self, node: ir.Node, index: int) -> bool:
        if node.domain == DOMAIN:
            return True
        schema = onnx.defs.get_schema(node.op_type, self._opset, "")
        formal = schema.outputs[min(index, len(schema.outputs) - 1)]
        return formal.type_str in {c.type_param_str for c in schema.type_constraints}

    # --- the graph ---------------------------------------------------------------------------------------------

    def _connect(self, node: ir.Node, half: bool) -> None:
        """Give every input the type that its node computes in."""
        if node.op_type == "Cast" and node.domain == "":
            return  # takes any type
        for index, value in enumerate(node.inputs):
            if value is None or value not in self._floats:
                continue
            wanted = self._dtype if half and self._follows(node, index) else ir.DataType.FLOAT
            if value.dtype != wanted:
                node.replace_input_with(index, self._typed(value, wanted))

    def _typed(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in another type; one cast serves all nodes that need it."""
        key = (value, dtype)
        if key not in self._in_type:
            name = self._new_name(f"{value.name}_{'half' if dtype == self._dtype else 'float'}")
            if _is_constant(value) and dtype == self._dtype:
                self._in_type[key] = self._half_constant(value, name)
            else:
                self._in_type[key] = self._cast(value, dtype, name)
        return self._in_type[key]

    def _half_constant(self, value: ir.Value, name: str) -> ir.Value:
        assert value.const_value is not None  # noqa: S101  (for the type checker: it is a constant)
        assert value.graph is not None  # noqa: S101  (the same)
        with np.errstate(over="ignore"):  # bounds of a Clip overflow
            tensor = ir.Tensor(value.const_value.numpy().astype(self._dtype.numpy()), name=name)
        half = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self._dtype), const_value=tensor)
        value.graph.initializers[name] = half
        return half

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], outputs=[output])
        node.name = next(n for n in _numbered(f"cast_{name}") if n not in self._node_names)
        self._node_names.add(node.name)
        producer, graph = value.producer(), value.graph
        if producer is not None and producer.graph is not None:
            producer.graph.insert_after(producer, node)
        elif graph is not None and len(graph):
            graph.insert_before(graph[0], node)
        elif graph is not None:
            graph.append(node)
        self.casts += 1
        return output

    def _new_name(self, wanted: str) -> str:
        name = next(n for n in _numbered(wanted) if n not in self._value_names)
        self._value_names.add(name)
        return name

    def _type_graph_outputs(self, graph: ir.Graph) -> None:
        """Give graph outputs their expected types under their own names; a cast of another node is reused."""
        in_half = graph is self._model.graph and self._options.io == "half"
        wanted = self._dtype if in_half else ir.DataType.FLOAT
        renamed: dict[ir.Value, ir.Value] = {}
        for index, value in enumerate(graph.outputs):
            if value in renamed:
                graph.outputs[index] = renamed[value]
            elif value in self._floats and value.dtype != wanted and value.producer() is not None:
                name = value.name or f"output_{index}"
                value.name = self._new_name(f"{name}_{'float' if in_half else 'half'}")
                output = self._typed(value, wanted)
                output.name = name
                graph.outputs[index] = renamed[value] = output

    def _drop_replaced_constants(self) -> None:
        """Drop float32 constants that only half nodes read; the half constant takes over the name."""
        for (value, _), half in self._in_type.items():
            if _is_constant(value) and _is_constant(half) and not value.uses() and not value.is_graph_output():
                name, graph = value.name, value.graph
                if graph is not None and name is not None:
                    graph.initializers.pop(name)
                    half.name = name


def _is_constant(value: ir.Value) -> bool:
    """Whether a value is an initializer that no caller can override."""
    return value.is_initializer() and not value.is_graph_input()


def _numbered(name: str) -> Iterator[str]:
    """The name, then the name with a number appended, from 1."""
    yield name
    number = 0
    while True:
        number += 1
        yield f"{name}_{number}"


def _between_kept(node: ir.Node) -> bool:
    """Whether all inputs come from kept operators and only kept operators read the result: half would only round it."""
    sources = [None if value is None else value.producer() for value in node.inputs]
    readers = [use.node for output in node.outputs for use in output.uses()]
    around = [*sources, *readers]
    inner = readers and not any(output.is_graph_output() for output in node.outputs)
    return bool(inner) and all(n is not None and n.domain == "" and n.op_type in KEPT_OPERATORS for n in around)
