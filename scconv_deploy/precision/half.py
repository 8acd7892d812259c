"""float16 and bfloat16 for an ONNX model: the data in half, the gate and what needs it in float32.

Every node gets one type. Where a value meets a node of the other type there is one Cast, however many nodes read it.
An SRU takes its data in half and its parameters in float32; its function computes statistics and gates in float32.

Works on the finished float32 graph and not on the module: by then BatchNorms are folded into convolutions in float32
(in half, a small running variance rounds to 0), and a graph of any exporter goes the same way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from scconv_deploy.errors import ModelError, UsageError
from scconv_deploy.precision.types import FIRST_OPSET, LARGEST, PRECISION, UNIT_ROUNDOFF, HalfPrecision, IoTypes
from scconv_deploy.rewrite.functions import DOMAIN

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
    "Exp": "overflows float16 at 11.1",
    "Pow": "overflows float16 at 256 squared",
}
"""Operators that stay in float32, and why.

Measured (``python -m benchmarks half_keep``): rounding what they give costs nothing; a runtime that also adds up in
half gets the means of ScConv-ResNet-50 wrong by up to 2 % in float16 and 73 % in bfloat16. Keeping Softmax too costs no
cast, for it stands between a kept mean and a product. Reasons that name a range follow from the type.
"""

_WORST_CONSTANT = 4.0  # in unit roundoffs: a constant that half represents worse than this is not rounded but lost
_TYPE_ATTRIBUTES = ("dtype",)


@dataclass(frozen=True)
class HalfOptions:
    """How a model is converted.

    Attributes:
        precision: ``fp16`` or ``bf16``.
        io: types of the graph's inputs and outputs; ``half`` saves the casts where the host can give it.
        keep: patterns (``*`` and ``?``) of nodes, weights or values that stay in float32.
    """

    precision: HalfPrecision
    io: IoTypes = "float32"
    keep: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Conversion:
    """A converted model.

    Attributes:
        half: how many nodes compute in half.
        kept: (node, why it stays in float32).
        casts: how many casts were put in.
    """

    model: ir.Model
    half: int
    kept: tuple[tuple[str, str], ...]
    casts: int


def converted(model: ir.Model, options: HalfOptions) -> Conversion:
    """:func:`to_half` of a copy, which says in its metadata what was done to it."""
    conversion = to_half(ir.from_proto(ir.to_proto(model)), options)
    conversion.model.metadata_props[PRECISION] = json.dumps(
        {"precision": options.precision, "io": options.io, "keep": list(options.keep)}
    )
    return conversion


def to_half(model: ir.Model, options: HalfOptions) -> Conversion:
    """Convert a float32 model, in place.

    Raises:
        ModelError: its opset is too low for the type; it holds half types already (it is as it was then), a value
            without a type, or functions of another domain.
        UsageError: a pattern of ``keep`` matches nothing.
    """
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.ShapeInferencePass()(model)
    _require_float32(model)
    opset, first = model.opset_imports[""], FIRST_OPSET[options.precision]
    if opset is None or opset < first:
        raise ModelError(
            f"The model has opset {opset}; {options.precision} needs {first}, from which convolutions take it.",
            f"Export it with --opset {first}, or run scconv-deploy rewrite IN.onnx -o OUT.onnx --opset {first}.",
        )
    conversion = _Conversion(model, options)
    conversion.run()
    return Conversion(model, conversion.half, tuple(conversion.kept.items()), conversion.casts)


def _require_float32(model: ir.Model) -> None:
    halves = set(DTYPES.values())
    produced = [output for node in model.graph for output in node.outputs]  # one without weights shows it there alone
    values = [*model.graph.inputs, *model.graph.initializers.values(), *produced]
    found = next((v for v in values if v.dtype in halves), None)
    if found is not None:
        raise ModelError(
            f"{found.name} is {found.dtype}: this model is in half precision already.", "Convert the float32 one."
        )
    foreign = sorted({f.domain for f in model.functions.values()} - {DOMAIN})
    if foreign:
        raise ModelError(f"The model has functions of {', '.join(foreign)}.", "Inline them first.")


class _Conversion:
    """The state of one conversion; :meth:`run` does it."""

    def __init__(self, model: ir.Model, options: HalfOptions) -> None:
        self._graph, self._options = model.graph, options
        self._dtype = DTYPES[options.precision]
        self._opset = model.opset_imports[""]
        self._floats = {v for v in self._values() if v.dtype == ir.DataType.FLOAT}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._constants: dict[ir.Value, ir.Value] = {}
        self.kept: dict[str, str] = {}
        self.half = self.casts = 0

    def run(self) -> None:
        nodes = list(self._graph)
        self._check_patterns(nodes)
        in_half = {node: self._reason_to_keep(node) == "" for node in nodes}
        for node, half in in_half.items():
            if half and any(output in self._floats for output in node.outputs):
                self.half += 1
                self._type_outputs(node)
        if self._options.io == "half":
            for value in self._graph.inputs:
                if value in self._floats:
                    value.dtype = self._dtype
        for node, half in in_half.items():
            self._connect(node, half)
        if self._options.io == "float32":
            self._restore_outputs()

    def _values(self) -> list[ir.Value]:
        produced = [output for node in self._graph for output in node.outputs]
        unknown = next((v for v in produced if v.dtype is None and v.name and list(v.uses())), None)
        if unknown is not None:
            raise ModelError(f"The type of {unknown.name} is not known.", "Simplify the model first.")
        return [*self._graph.inputs, *self._graph.initializers.values(), *produced]

    # --- which nodes -------------------------------------------------------------------------------------------

    def _check_patterns(self, nodes: list[ir.Node]) -> None:
        for pattern in self._options.keep:
            if not any(_matches(node, pattern) for node in nodes):
                close = get_close_matches(pattern, {name for node in nodes for name in _names(node)})
                names = f"Close are {', '.join(close)}." if close else "Take names of modules, as in 'layer1.0.*'."
                raise UsageError(f"--keep {pattern!r} matches no node or weight.", names)

    def _reason_to_keep(self, node: ir.Node) -> str:
        """Why a node stays in float32; empty if it need not, or if it has nothing to do with floats."""
        touches = any(v in self._floats for v in (*node.inputs, *node.outputs) if v is not None)
        reason = self._reason(node) if touches else ""
        if reason:
            self.kept[node.name or node.outputs[0].name or node.op_type] = f"{node.op_type}: {reason}"
        return reason

    def _reason(self, node: ir.Node) -> str:
        pattern = next((p for p in self._options.keep if _matches(node, p)), None)
        if pattern is not None:
            return f"kept by {pattern!r}"
        if node.domain == DOMAIN:
            return ""
        if node.domain not in ("", "ai.onnx"):
            return f"the domain {node.domain} is not known to take half"
        if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
            return "it holds a graph"
        if any(name in node.attributes for name in _TYPE_ATTRIBUTES):
            return "its type is an attribute"
        if node.op_type in KEPT_OPERATORS:
            return KEPT_OPERATORS[node.op_type]
        if not self._schema_allows(node):
            return "the operator has no half type"
        return next((why for v in self._variable_inputs(node) if (why := self._bad_constant(v))), "")

    def _schema_allows(self, node: ir.Node) -> bool:
        """Whether some float input or output has a type that may be half."""
        schema = onnx.defs.get_schema(node.op_type, self._opset, "")
        allowed = {c.type_param_str: c.allowed_type_strs for c in schema.type_constraints}
        wanted = f"tensor({'float16' if self._options.precision == 'fp16' else 'bfloat16'})"
        variables = [f.type_str for f in (*schema.inputs, *schema.outputs) if f.type_str in allowed]
        of_floats = [t for t in variables if "tensor(float)" in allowed[t]]
        return bool(of_floats) and all(wanted in allowed[t] for t in of_floats)

    def _bad_constant(self, value: ir.Value) -> str:
        """What half would do to a constant, where rounding is not the word for it."""
        if value.const_value is None or value not in self._floats:
            return ""
        array = value.const_value.numpy().astype(np.float64)
        finite = array[np.isfinite(array)]
        if np.abs(finite).max(initial=0.0) > LARGEST[self._options.precision]:
            return f"the constant {value.name} overflows half: {np.abs(finite).max():.3g}"
        rounded = finite.astype(self._dtype.numpy()).astype(np.float64)
        error, norm = np.linalg.norm(rounded - finite), np.linalg.norm(finite)
        if error > _WORST_CONSTANT * UNIT_ROUNDOFF[self._options.precision] * norm:
            return f"the constant {value.name} vanishes in half: {np.abs(finite[finite != 0]).max():.3g}"
        return ""

    # --- the graph ---------------------------------------------------------------------------------------------

    def _variable_inputs(self, node: ir.Node) -> list[ir.Value]:
        """The float inputs whose type follows the node's; those of an SRU's parameters and of fixed types do not."""
        found = []
        for index, value in enumerate(node.inputs):
            if value is not None and value in self._floats and self._follows(node, index):
                found.append(value)
        return found

    def _follows(self, node: ir.Node, index: int) -> bool:
        if node.domain == DOMAIN:
            return index == 0
        schema = onnx.defs.get_schema(node.op_type, self._opset, "")
        formal = schema.inputs[min(index, len(schema.inputs) - 1)]
        return formal.type_str in {c.type_param_str for c in schema.type_constraints}

    def _type_outputs(self, node: ir.Node) -> None:
        for output in node.outputs:
            if output in self._floats:
                output.dtype = self._dtype
        if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.FLOAT:
            node.attributes["to"] = ir.AttrInt64("to", int(self._dtype))
        if node.op_type == "ConstantOfShape" and "value" in node.attributes:
            array = node.attributes["value"].as_tensor().numpy()
            node.attributes["value"] = ir.AttrTensor("value", ir.Tensor(array.astype(self._dtype.numpy())))

    def _connect(self, node: ir.Node, half: bool) -> None:
        """Give every input the type that its node computes in."""
        if node.op_type == "Cast" and node.domain == "":
            return  # takes any type
        for index, value in enumerate(node.inputs):
            if value is None or value not in self._floats:
                continue
            wanted = self._dtype if half and self._follows(node, index) else ir.DataType.FLOAT
            if value.dtype != wanted:
                node.replace_input_with(index, self._in_type(value, wanted))

    def _in_type(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        if value.const_value is not None and dtype == self._dtype:
            return self._half_constant(value)
        key = (value, dtype)
        if key not in self._casts:
            self._casts[key] = self._cast(value, dtype, f"{value.name}_{'half' if dtype == self._dtype else 'float'}")
        return self._casts[key]

    def _half_constant(self, value: ir.Value) -> ir.Value:
        if value not in self._constants:
            assert value.const_value is not None  # noqa: S101  (for the type checker: the caller looked)
            array = value.const_value.numpy().astype(self._dtype.numpy())
            others = any(not self._constant_becomes_half(use.node) for use in value.uses())
            name = f"{value.name}_half" if others else value.name
            tensor = ir.Tensor(array, name=name)
            half = ir.Value(name=name, shape=value.shape, type=ir.TensorType(self._dtype), const_value=tensor)
            if not others:
                self._graph.initializers.pop(value.name or "")
            self._graph.initializers[name or ""] = half
            self._constants[value] = half
        return self._constants[value]

    def _constant_becomes_half(self, node: ir.Node) -> bool:
        return (node.name or node.outputs[0].name or node.op_type) not in self.kept and node.domain != DOMAIN

    def _cast(self, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
        output = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype))
        node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", int(dtype))], outputs=[output], name=f"cast_{name}")
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        self.casts += 1
        return output

    def _restore_outputs(self) -> None:
        """float32 under the outputs' own names; a kept node may have asked for the same cast already."""
        for index, value in enumerate(self._graph.outputs):
            if value in self._floats and value.dtype == self._dtype:
                name = value.name or f"output_{index}"
                value.name = f"{name}_half"
                output = self._in_type(value, ir.DataType.FLOAT)
                output.name = name
                self._graph.outputs[index] = output


def _matches(node: ir.Node, pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in _names(node))


def _names(node: ir.Node) -> list[str]:
    """Its own, its outputs', those of its weights (``layer1.0.conv1.weight``)."""
    names = [node.name, *(o.name for o in node.outputs)]
    names += [v.name for v in node.inputs if v is not None and v.const_value is not None]
    return [name for name in names if name]
