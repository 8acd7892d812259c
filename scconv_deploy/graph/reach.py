"""Uses of a graph's inputs that limit their values: index of a table, size, count."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import onnx

from scconv_deploy.graph.types import graphs_of

_TABLES = {"Gather": "axis", "GatherElements": "axis", "ScatterElements": "axis", "Scatter": "axis"}
_TABLES_OF_ROWS = {"GatherND": "batch_dims", "ScatterND": ""}
_SIZES: dict[str, tuple[int, ...]] = {
    "Reshape": (1,), "Expand": (1,), "Tile": (1,), "ConstantOfShape": (0,), "Resize": (2, 3), "Upsample": (1,),
    "Range": (0, 1, 2), "Pad": (1, 3), "OneHot": (1,), "TopK": (1,), "Slice": (1, 2, 3, 4), "Split": (1,),
    "SplitToSequence": (1,), "SequenceAt": (1,), "Squeeze": (1,), "Unsqueeze": (1,), "Trilu": (1,), "CumSum": (1,),
    "CenterCropPad": (1,), "AffineGrid": (1,), "Loop": (0,),
}  # fmt: skip
"""Indices of the inputs that are sizes or axes, by operator."""

_LAYERS = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "Shape", "Size"}
_FLOATS = (
    onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE,
)  # fmt: skip
_COUNTING = {"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "ArgMax", "ArgMin", "Sin", "Cos"}


@dataclass
class Reach:
    """Uses of one input.

    Attributes:
        table: rows of the smallest table that it is an index of; None if it is no index.
        is_size: whether it is a size or an axis.
        is_counted: whether it is compared, cast to an integer or a bool, or used as an angle.
    """

    table: int | None = None
    is_size: bool = False
    is_counted: bool = False


def reaches(proto: onnx.ModelProto) -> dict[str, Reach]:
    """Uses of each input's values, as far as element-wise operators and changes of shape carry them."""
    found = {value.name: Reach() for value in proto.graph.input}
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, data_prop=True)
    except Exception:  # onnx raises several; tables of unknown size then count as none
        inferred = proto
    _Reader(found).read(inferred.graph, {name: {name} for name in found})
    return found


class _Reader:
    def __init__(self, found: dict[str, Reach]) -> None:
        self._found = found
        self._shapes: dict[str, list[int]] = {}
        self._kinds: dict[str, int] = {}

    def read(self, graph: onnx.GraphProto, carried: dict[str, set[str]]) -> dict[str, set[str]]:
        """Follow a graph's nodes. Returns value -> the inputs whose values it carries."""
        for value in (*graph.input, *graph.value_info, *graph.output):
            kind = value.type.tensor_type
            self._shapes[value.name] = [d.dim_value if d.HasField("dim_value") else 0 for d in kind.shape.dim]
            self._kinds[value.name] = kind.elem_type
        for tensor in graph.initializer:
            self._shapes[tensor.name] = list(tensor.dims)
        for node in graph.node:
            for body in graphs_of(node).values():
                inner = self.read(body, dict(carried))
                everything = set().union(*(inner.get(v.name, set()) for v in body.output))
                carried |= {name: carried.get(name, set()) | everything for name in node.output}
            self._follow(node, carried)
        return carried

    def _follow(self, node: onnx.NodeProto, carried: dict[str, set[str]]) -> None:
        sources = [carried.get(name, set()) for name in node.input]
        special: Iterable[int] = ()
        if node.op_type in _TABLES or node.op_type in _TABLES_OF_ROWS:
            special = (1,)
            for name in sources[1]:
                rows = self._rows(node)
                if rows:
                    known = self._found[name].table
                    self._found[name].table = rows if known is None else min(known, rows)
        elif node.op_type in _SIZES:
            special = _SIZES[node.op_type]
            for index in special:
                for name in sources[index] if index < len(sources) else ():
                    self._found[name].is_size = True
        elif node.op_type in _COUNTING or (node.op_type == "Cast" and self._decides(node)):
            for name in set().union(*sources):
                self._found[name].is_counted = True
        if node.op_type in _LAYERS:
            return
        through = set().union(*(names for index, names in enumerate(sources) if index not in special))
        for output in node.output:
            carried[output] = carried.get(output, set()) | through

    def _rows(self, node: onnx.NodeProto) -> int:
        """Rows of a node's table along the axis of the index; 0 if unknown."""
        shape = self._shapes.get(node.input[0], [])
        if node.op_type in _TABLES_OF_ROWS:
            return min(shape, default=0)
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        return shape[axis] if -len(shape) <= axis < len(shape) else 0

    def _decides(self, cast: onnx.NodeProto) -> bool:
        """Whether a cast turns floats into integers, or anything into bool."""
        kind = self._kinds.get(cast.output[0], onnx.TensorProto.FLOAT)
        was_float = self._kinds.get(cast.input[0], onnx.TensorProto.FLOAT) in _FLOATS
        return kind == onnx.TensorProto.BOOL or (kind not in _FLOATS and was_float)
