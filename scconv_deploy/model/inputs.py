"""Inputs as the user names them: shapes, dtypes, open axes. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scconv_deploy.errors import UsageError

if TYPE_CHECKING:
    pass


DTYPES = ("float32", "float64", "float16", "int64", "int32", "uint8", "bool")
"""Dtypes of inputs: those that torch, NumPy and ONNX share."""


@dataclass(frozen=True)
class InputSpec:
    """One input tensor: shape (axis 0 is the batch), the forward parameter it goes to (None: by position), dtype."""

    shape: tuple[int, ...]
    name: str | None = None
    dtype: str = "float32"

    @classmethod
    def parse(cls, text: str) -> InputSpec:
        """Read ``[name:]1x3x224x224[:dtype]``.

        Raises:
            UsageError: it is written in another way.
        """
        match = re.fullmatch(r"(?:([A-Za-z_]\w*):)?(\d+(?:x\d+)*)(?::(\w+))?", text)
        if match is None:
            raise UsageError(f"--input {text!r} is not [name:]SHAPE[:dtype].", "Write for example 1x3x224x224.")
        shape = tuple(int(size) for size in match[2].split("x"))
        dtype = match[3] or "float32"
        if dtype not in DTYPES:
            raise UsageError(f"--input {text!r}: no dtype {dtype!r}.", f"Known: {', '.join(DTYPES)}.")
        if min(shape) < 1:
            raise UsageError(
                f"--input {text!r}: every size must be at least 1.",
                "Give the sizes of one example, such as 1x3x224x224.",
            )
        return cls(shape, match[1], dtype)

    def __str__(self) -> str:
        name = f"{self.name}:" if self.name else ""
        dtype = "" if self.dtype == "float32" else f":{self.dtype}"
        return name + "x".join(map(str, self.shape)) + dtype


@dataclass(frozen=True)
class DynamicAxis:
    """A dynamic axis of size ``minimum`` to ``maximum``; an engine is tuned for ``optimum``.

    ``input`` is the name of an input; None means axis 0 of every input, one shared symbol ``batch``. Sizes are the
    multiples of ``step``. Axes with the same name in ``shared`` always have the same size.
    """

    minimum: int
    optimum: int
    maximum: int
    axis: int = 0
    input: str | None = None
    step: int = 1
    shared: str | None = None

    @classmethod
    def parse_batch(cls, text: str) -> DynamicAxis:
        """Read ``--batch MIN:OPT:MAX[:STEP]``."""
        low, best, high, step = _parse_range("--batch", text)
        return cls(low, best, high, step=step)

    @classmethod
    def parse(cls, text: str) -> DynamicAxis:
        """Read ``--dynamic NAME:AXIS=MIN:OPT:MAX[:STEP]``."""
        first, *others = cls.parse_all(text)
        if others:
            raise UsageError(
                f"--dynamic {text!r} names several axes, expected one.", "Write for example x:2=64:224:512."
            )
        return first

    @classmethod
    def parse_all(cls, text: str) -> tuple[DynamicAxis, ...]:
        """Read ``--dynamic NAME:AXIS=MIN:OPT:MAX[:STEP]``, or several ``NAME:AXIS,NAME:AXIS=...`` of one size."""
        match = re.fullmatch(rf"({_AXIS}(?:,{_AXIS})*)=(.+)", text)
        if match is None:
            raise UsageError(f"--dynamic {text!r} is not NAME:AXIS=MIN:OPT:MAX.", "Write for example x:2=64:224:512.")
        low, best, high, step = _parse_range("--dynamic", match[2])
        places = [(name, int(axis)) for name, _, axis in (place.partition(":") for place in match[1].split(","))]
        shared = "{}_{}".format(*places[0]) if len(places) > 1 else None
        return tuple(cls(low, best, high, axis, name, step, shared) for name, axis in places)

    @property
    def symbol(self) -> str:
        return "batch" if self.input is None else self.shared or f"{self.input}_{self.axis}"


_LARGEST_SIZE = 2**31 - 1  # of an axis in TensorRT
_AXIS = r"[A-Za-z_]\w*:\d+"


def _parse_range(option: str, text: str) -> tuple[int, int, int, int]:
    """Minimum, optimum, maximum and step."""
    match = re.fullmatch(r"(\d+):(\d+):(\d+)(?::(\d+))?", text)
    if match is None:
        raise UsageError(f"{option} {text!r} is not MIN:OPT:MAX.", "Write for example 1:4:8.")
    low, best, high, step = (int(g) for g in match.groups("1"))
    if not 1 <= low <= best <= high:
        ordered = ":".join(str(max(size, 1)) for size in sorted((low, best, high)))
        raise UsageError(f"{option} {text!r}: expected 1 <= MIN <= OPT <= MAX.", f"Write for example {ordered}.")
    if high > _LARGEST_SIZE:
        raise UsageError(f"{option} {text!r}: MAX is {high}, expected at most {_LARGEST_SIZE}.", "Give a smaller one.")
    for size in (low, best, high):
        if step < 1 or size % step:
            raise UsageError(
                f"{option} {text!r}: MIN:OPT:MAX:STEP are multiples of STEP, found {size} for {step}.",
                "Give whole steps, for example 64:224:512:32.",
            )
    return low, best, high, step
