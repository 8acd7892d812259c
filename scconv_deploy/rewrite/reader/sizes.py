"""Concrete sizes for open axes; a symbol has the same size everywhere in a graph.

torch.export writes the sizes of inner tensors as expressions of the inputs' symbols (``((h - 1)//2) + 1``). The symbols
get numbers here, and the expressions are computed from them.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterable

import onnx_ir as ir

SAMPLES = 3
_BATCHES = (2, 3, 5)
_STEP = 32  # spatial sizes are multiples of it, so that strides and numbers of groups divide them
_VOLUME_STEP = 16  # the same for five axes and more
_VOLUME_SIZES = 3  # sizes of a volume's axes, in turn: a group must stay small enough to tell L from L - 1
_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
}


class Sizes:
    """Numbers for the symbols of a graph.

    Args:
        inputs: of the graph.
        sample: 0 to ``SAMPLES - 1``. Each sample gives every symbol another number; symbols of a sample differ.
    """

    def __init__(self, inputs: Iterable[ir.Value], sample: int) -> None:
        self._sample = sample
        self._numbers: dict[str, int] = {}
        self._batches = 0  # number of symbols of axis 0
        inputs = list(inputs)
        self._volumes = any(value.shape is not None and len(value.shape) > 4 for value in inputs)
        for value in inputs:
            self.of(value)

    def of(self, value: ir.Value) -> tuple[int | None, ...] | None:
        """Sizes of a tensor, None for an unknown axis; None for a tensor of unknown rank."""
        return None if value.shape is None else tuple(self._axis(d, axis) for axis, d in enumerate(value.shape))

    def place(self, axis: int) -> int:
        """A size for an unknown axis."""
        if self._volumes:
            return _BATCHES[self._sample] if axis == 0 else _VOLUME_STEP * (1 + (self._sample + axis) % _VOLUME_SIZES)
        return _BATCHES[self._sample] if axis == 0 else _STEP * (1 + self._sample) + 4 * axis

    def _free(self) -> int:
        """A size for one more symbol."""
        if not self._volumes:
            return _STEP * (2 + self._sample + len(self._numbers))
        count = len(self._numbers) - self._batches
        return _VOLUME_STEP * (1 + ((self._sample + count) % _VOLUME_SIZES if count < _VOLUME_SIZES else count))

    def _axis(self, size: int | ir.SymbolicDim, axis: int) -> int | None:
        if isinstance(size, int):
            return size
        if size.value is None:
            return None
        try:
            return self._number(ast.parse(str(size.value), mode="eval").body, axis)
        except (SyntaxError, ZeroDivisionError):
            return None

    def _number(self, node: ast.expr, axis: int) -> int:
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](self._number(node.left, axis), self._number(node.right, axis))
        if not isinstance(node, ast.Name):
            raise SyntaxError(ast.unparse(node))
        if node.id not in self._numbers:
            self._numbers[node.id] = _BATCHES[self._sample] if axis == 0 else self._free()
            self._batches += axis == 0
        return self._numbers[node.id]
