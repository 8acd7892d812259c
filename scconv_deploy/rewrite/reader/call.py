"""One node as :mod:`.operators` and :mod:`.shape_operators` see it, and what both ask of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scconv_deploy.rewrite.reader.meaning import Constant, Known, Shape


@dataclass(frozen=True)
class Call:
    """A node with the meanings of its inputs (None: left out) and its attributes as Python values."""

    operator: str
    inputs: Sequence[Known | None]
    attributes: Mapping[str, Any]
    sample: Shape
    outputs: int = 1

    def integers(self, index: int, attribute: str) -> list[int] | None:
        """What newer opsets take as an input and older ones as an attribute."""
        if len(self.inputs) > index and isinstance(given := self.inputs[index], Constant):
            return [int(v) for v in given.value.reshape(-1)]
        value = self.attributes.get(attribute)
        return None if value is None else [int(v) for v in value]


def scalar(value: Known | None) -> float | None:
    """The number that a constant holds in every place."""
    return value.number if isinstance(value, Constant) else None


def pair_of(call: Call, first: type, second: type) -> tuple[Any, Any] | None:
    """The two inputs, the one of the first type first."""
    a, b = call.inputs[0], call.inputs[1]
    if isinstance(a, first) and isinstance(b, second):
        return a, b
    if isinstance(b, first) and isinstance(a, second):
        return b, a
    return None
