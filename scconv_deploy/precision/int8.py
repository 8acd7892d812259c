"""Quantise an ONNX model to int8: explicit QuantizeLinear and DequantizeLinear around Conv and Gemm.

The model stays in its float type (float32, float16 or bfloat16) between the quantisers. Weights are stored as int8 and
dequantised in the graph; biases stay float, because TensorRT-RTX refuses int32 biases behind a DequantizeLinear.

ONNX Runtime's quantiser gives observers and scales (:mod:`.calibration`). The nodes are put in here: its QDQQuantizer
feeds *every* reader of a tensor from the dequantised one, SRUs and trunks of residual connections too, and quantises
both inputs of an Add.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common as passes

from scconv_deploy.errors import ModelError
from scconv_deploy.graph.contract import IR_VERSION, MODULE
from scconv_deploy.graph.hygiene import tidy
from scconv_deploy.graph.types import half_in, quantization_of
from scconv_deploy.precision.calibration import Range, levels_of, rounded_scales, weight_codes, weight_scales
from scconv_deploy.precision.float32 import as_ir
from scconv_deploy.precision.placement import (
    Placement,
    PlacementOptions,
    Unprovable,
    channels_first,
    output_axis,
    place,
)
from scconv_deploy.records.codec import encode
from scconv_deploy.records.quantization import METADATA, Levels, QuantizationRecord

FIRST_HALF_OPSET = 19
"""First opset whose quantisers take half data."""


@dataclass(frozen=True, eq=False)
class Prepared:
    """A float model with typed values, and the placement of its quantisers."""

    model: ir.Model
    placement: Placement

    @property
    def values(self) -> list[str]:
        """Names of the values to be observed."""
        return [value.name or "" for value in self.placement.values]


def prepared(proto: onnx.ModelProto, options: PlacementOptions, unprovable: Unprovable | None = None) -> Prepared:
    """A copy of a float model, ready to be quantised, and the placement.

    Args:
        unprovable: why PyTorch has no layer that could be fake-quantised; None without a model.

    Raises:
        ModelError: it is quantised already, or its opset has no quantisers for its type.
        UsageError: a pattern matches nothing, or no layer is left.
    """
    if quantization := quantization_of(proto):
        raise ModelError(f"The model is {quantization} already.", "Quantise the float file that it was made from.")
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if (half := half_in(proto)) is not None and opset < FIRST_HALF_OPSET:
        raise ModelError(
            f"The model is {half} with opset {opset}; quantisers take it since opset {FIRST_HALF_OPSET}.",
            f"Export it with --opset {FIRST_HALF_OPSET} or later.",
        )
    model = as_ir(onnx.shape_inference.infer_shapes(proto, data_prop=True))
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    return Prepared(model, place(model, options, unprovable))


def quantized(found: Prepared, ranges: Mapping[str, Range], record: QuantizationRecord) -> ir.Model:
    """Put quantisers into a prepared model, which is changed.

    Args:
        ranges: of the observed values, by name.
        record: origin of the ranges; the levels are added to it and stored in the model.
    """
    placement, graph = found.placement, found.model.graph
    stored: dict[str, Levels] = {}
    reads: dict[str, int] = {}
    names = _Names(found.model)
    for value, readers in placement.readers.items():
        dtype = value.dtype
        assert dtype is not None  # noqa: S101  (for the type checker: the placement looked)
        together = [ranges[v.name] for v in placement.group_of(value) if v.name in ranges]  # type: ignore[index]
        levels = levels_of(together, record.target, dtype.numpy())
        stored[value.name or ""], reads[value.name or ""] = levels, len(readers)
        read = _activation(graph, names, value, levels)
        for node, index in readers:
            node.replace_input_with(index, read)
    made: dict[tuple[ir.Value, int], ir.Value] = {}
    for node in placement.layers:
        weight = node.inputs[1]
        assert weight is not None  # noqa: S101  (for the type checker: the placement looked)
        axis = output_axis(node)
        if (weight, axis) not in made:
            both = any(other is weight for other, _ in made)  # one matrix, also read transposed
            name = f"{weight.name}{'_transposed' if both else ''}"
            made[weight, axis] = _weight(graph, names, node, name, record.largest_code)
        node.replace_input_with(1, made[weight, axis])
    for weight in {weight for weight, _ in made}:
        if not weight.uses() and not weight.is_graph_output():
            del graph.initializers[weight.name or ""]
    document = encode(QuantizationRecord(**{**vars(record), "activations": stored, "reads": reads}))
    found.model.metadata_props[METADATA] = json.dumps(document)
    return found.model


def quantized_proto(found: Prepared, ranges: Mapping[str, Range], record: QuantizationRecord) -> onnx.ModelProto:
    """The same as a file in the form of all that this tool writes."""
    proto = ir.to_proto(quantized(found, ranges, record))
    proto.ir_version = min(proto.ir_version, IR_VERSION)
    tidy(proto)
    return proto


class _Names:
    """Names that no value of a model has yet."""

    def __init__(self, model: ir.Model) -> None:
        graph = model.graph
        values = [*graph.inputs, *graph.initializers.values(), *(o for node in graph.all_nodes() for o in node.outputs)]
        self._taken = {value.name for value in values}

    def free(self, wanted: str) -> str:
        """This name, with a number if it is taken."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


def _activation(graph: ir.Graph, names: _Names, value: ir.Value, levels: Levels) -> ir.Value:
    """Quantise and dequantise a value right behind its producer; return the dequantised value."""
    name = value.name or ""
    kind = np.int8 if levels.signed else np.uint8
    scale = _constant(graph, names.free(f"{name}_scale"), np.asarray(levels.scale, value.dtype.numpy()))  # type: ignore[union-attr]
    zero = _constant(graph, names.free(f"{name}_zero_point"), np.asarray(levels.zero_point, kind))
    codes = _value(names.free(f"{name}_QuantizeLinear_Output"), ir.DataType(zero.dtype), value.shape)  # type: ignore[arg-type]
    read = _value(names.free(f"{name}_DequantizeLinear_Output"), value.dtype, value.shape)  # type: ignore[arg-type]
    first = ir.node("QuantizeLinear", [value, scale, zero], outputs=[codes], name=names.free(f"{name}_QuantizeLinear"))
    second = ir.node(
        "DequantizeLinear", [codes, scale, zero], outputs=[read], name=names.free(f"{name}_DequantizeLinear")
    )
    producer = value.producer()
    if producer is not None:
        for node in (first, second):
            if MODULE in producer.metadata_props:
                node.metadata_props[MODULE] = producer.metadata_props[MODULE]
        graph.insert_after(producer, [first, second])
    else:
        graph.insert_before(graph[0], [first, second])
    return read


def _weight(graph: ir.Graph, names: _Names, node: ir.Node, name: str, largest_code: int) -> ir.Value:
    """Store a layer's weight as int8 under a name and dequantise it; return the dequantised weight."""
    channels, axis = channels_first(node), output_axis(node)
    dtype = channels.dtype
    channels = channels.astype(np.float32)
    scales = rounded_scales(weight_scales(channels, largest_code), dtype)
    codes = np.ascontiguousarray(np.moveaxis(weight_codes(channels, scales), 0, axis))
    stored = _constant(graph, names.free(f"{name}_quantized"), codes)
    scale = _constant(graph, names.free(f"{name}_scale"), scales.astype(dtype))
    zero = _constant(graph, names.free(f"{name}_zero_point"), np.zeros(len(scales), np.int8))
    read = _value(names.free(f"{name}_DequantizeLinear_Output"), ir.DataType.from_numpy(dtype), ir.Shape(codes.shape))
    graph.insert_before(
        node,
        ir.node(
            "DequantizeLinear", [stored, scale, zero], {"axis": axis}, outputs=[read],
            name=names.free(f"{name}_DequantizeLinear"),
        ),
    )  # fmt: skip
    return read


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor)
    graph.initializers[name] = value
    return value


def _value(name: str, dtype: ir.DataType, shape: ir.Shape | None) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=shape)
