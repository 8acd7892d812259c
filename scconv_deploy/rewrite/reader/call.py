"""One ONNX node with the meanings of its inputs, as :mod:`.operators` and :mod:`.shape_operators` read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scconv_deploy.rewrite.reader.meaning import Constant, Known, Shape


@dataclass(frozen=True)
class Call:
    """A node with the meanings of its inputs (None: left out), its attributes as Python values, and x's shape."""

    operator: str
    inputs: Sequence[Known | None]
    attributes: Mapping[str, Any]
    sample: Shape
    outputs: int = 1

    def integers(self, index: int, attribute: str) -> list[int] | None:
        """Integers that newer opsets take as an input and older ones as an attribute; None if not constant."""
        if len(self.inputs) > index and isinstance(given := self.inputs[index], Constant):
            return [int(v) for v in given.value.reshape(-1)]
        value = self.attributes.get(attribute)
        return None if value is None else [int(v) for v in value]


def scalar(value: Known | None) -> float | None:
    """The one number of a constant; None if its entries differ, or the value is no constant."""
    return value.number if isinstance(value, Constant) else None


def pair_of(call: Call, first: type, second: type) -> tuple[Any, Any] | None:
    """The two inputs ordered by type, in either operand order; None if they have other types."""
    a, b = call.inputs[0], call.inputs[1]
    if isinstance(a, first) and isinstance(b, second):
        return a, b
    if isinstance(b, first) and isinstance(a, second):
        return b, a
    return None
