"""Optimization profiles, the shapes that an engine takes: ``--batch``, ``--dynamic``, ``--shape``, ``--profile``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from scconv_deploy.errors import UsageError
from scconv_deploy.runtimes.tensorrt.engine import EngineProfile

if TYPE_CHECKING:  # this module also runs on the device, without the model package
    from scconv_deploy.model.inputs import DynamicAxis

_TWICE = "Leave one out."
_EXAMPLE = "Write for example x:1x3x64x64:8x3x224x224:32x3x512x512, or one shape for a static one."


@dataclass(frozen=True)
class ShapeRange:
    """Value of ``--shape``, or part of a ``--profile``: minimum, optimum and maximum shape of an input."""

    input: str
    minimum: tuple[int, ...]
    optimum: tuple[int, ...]
    maximum: tuple[int, ...]

    @classmethod
    def parse(cls, text: str, option: str = "--shape") -> ShapeRange:
        """Read ``NAME:MIN:OPT:MAX``, each a shape such as ``1x3x224x224``, or ``NAME:SHAPE``.

        Args:
            option: what errors call it.

        Raises:
            UsageError: another syntax, or not MIN <= OPT <= MAX on every axis.
        """
        match = re.fullmatch(r"(.+?):(\d+(?:x\d+)*)(?::(\d+(?:x\d+)*):(\d+(?:x\d+)*))?", text)
        if match is None:
            raise UsageError(f"{option} {text!r} is not NAME:MIN:OPT:MAX.", _EXAMPLE)
        low = _sizes(match[2])
        best, high = (_sizes(match[3]), _sizes(match[4])) if match[3] else (low, low)
        if not len(low) == len(best) == len(high):
            raise UsageError(f"{option} {text!r}: the three shapes differ in rank.", _EXAMPLE)
        if any(not 1 <= a <= b <= c for a, b, c in zip(low, best, high, strict=True)):
            raise UsageError(f"{option} {text!r}: expected 1 <= MIN <= OPT <= MAX on every axis.", _EXAMPLE)
        if any(size > _LARGEST_SIZE for size in high):
            raise UsageError(f"{option} {text!r}: an axis is larger than {_LARGEST_SIZE:,}.", "Give a smaller size.")
        return cls(match[1], low, best, high)


_LARGEST_SIZE = 2**31 - 1
"""Of an axis in TensorRT, whose dimensions were 32 bits wide."""


def parse_profile(text: str) -> tuple[ShapeRange, ...]:
    """Read a ``--profile``: one or more ``NAME:MIN:OPT:MAX`` with commas between them (UsageError otherwise)."""
    return tuple(ShapeRange.parse(part, "--profile") for part in text.split(","))


def check_ranges(
    shapes: Sequence[ShapeRange], axes: Sequence[DynamicAxis], profiles: Sequence[Sequence[ShapeRange]]
) -> None:
    """Refuse profiles beside other ranges (UsageError): a profile says the range of every open input itself."""
    if profiles and (shapes or axes):
        raise UsageError(
            "--profile excludes --shape, --batch and --dynamic.", "Give each open input its range in every --profile."
        )


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split("x"))


def resolve_profiles(
    inputs: Mapping[str, tuple[int, ...]],
    shapes: Sequence[ShapeRange],
    axes: Sequence[DynamicAxis],
    profiles: Sequence[Sequence[ShapeRange]] = (),
) -> tuple[EngineProfile, ...]:
    """Range of every input of a graph in each optimization profile; there is one profile unless ``profiles`` has more.

    Args:
        inputs: shapes of the graph's inputs, see :attr:`.source.GraphFacts.shapes`.
        shapes: ranges of whole shapes; they take precedence over ``axes``.
        axes: ranges of single axes; one without an input is axis 0 of every input that has it open.
        profiles: the ranges of each profile, instead of ``shapes`` and ``axes``.

    Raises:
        UsageError: an open axis without a range, a name or axis that the graph does not have, a size that
            contradicts a static one, or several profiles for a graph without an open axis.
    """
    check_ranges(shapes, axes, profiles)
    if profiles and not any(-1 in shape for shape in inputs.values()):
        raise UsageError("--profile: no input of the model has an open axis.", "Leave it out, or export with --batch.")
    found: list[EngineProfile] = []
    for index, ranges in enumerate(profiles or (shapes,)):
        option = "--profile" if profiles else "--shape"
        found += [replace(p, index=index) for p in _resolve_one(inputs, ranges, axes, option)]
    return tuple(found)


def _resolve_one(
    inputs: Mapping[str, tuple[int, ...]], shapes: Sequence[ShapeRange], axes: Sequence[DynamicAxis], option: str
) -> list[EngineProfile]:
    named = [s.input for s in shapes] + [a.input for a in axes if a.input is not None]
    unknown = [name for name in named if name not in inputs]
    if unknown:
        raise UsageError(f"The model has no input {unknown[0]!r}.", f"Its inputs: {', '.join(inputs)}.")
    for axis in axes:
        if axis.input is not None and axis.axis >= len(inputs[axis.input]):
            raise UsageError(
                f"--dynamic {axis.input}:{axis.axis}: the input is {_text(inputs[axis.input])}.", "Axes count from 0."
            )
    by_name = {shape.input: shape for shape in shapes}
    if len(by_name) < len(shapes):
        raise UsageError(f"{option}: an input is given twice.", _TWICE)
    if any(a.input is None for a in axes) and not any(shape and shape[0] == -1 for shape in inputs.values()):
        raise UsageError("--batch: no input has an open axis 0.", "Export it with --batch, or leave it out.")
    return [_profile(name, shape, by_name.get(name), axes, option) for name, shape in inputs.items()]


def _profile(
    name: str, shape: tuple[int, ...], given: ShapeRange | None, axes: Sequence[DynamicAxis], option: str
) -> EngineProfile:
    if given is not None:
        wanted = (given.minimum, given.optimum, given.maximum)
        if len(given.minimum) != len(shape) or any(
            size not in (-1, w) for sizes in wanted for size, w in zip(shape, sizes, strict=True)
        ):
            raise UsageError(
                f"{option} {name}: the model's input is {_text(shape)}, found {', '.join(map(_text, wanted))}.",
                "Only axes that are open (-1) can be chosen.",
            )
        return EngineProfile(name, *wanted)
    ranges = [(size, size, size) for size in shape]
    seen = set()
    for axis in axes:
        if axis.input not in (None, name) or (axis.input is None and (not shape or shape[0] != -1)):
            continue
        if axis.axis in seen:
            raise UsageError(f"Axis {axis.axis} of input {name} is given twice.", _TWICE)
        seen.add(axis.axis)
        if shape[axis.axis] != -1:
            raise UsageError(
                f"--dynamic {name}:{axis.axis}: this axis is {shape[axis.axis]} in the model, not open.",
                f"Export it with --dynamic {name}:{axis.axis}=..., or leave it out.",
            )
        ranges[axis.axis] = (axis.minimum, axis.optimum, axis.maximum)
    still = [index for index, sizes in enumerate(ranges) if -1 in sizes]
    if still:
        remedy = "--batch 1:8:32" if still[0] == 0 else f"--dynamic {name}:{still[0]}=64:224:512"
        raise UsageError(
            f"Input {name!r} is {_text(shape)}: the range of axis {still[0]} is not known"
            f"{' in one --profile' if option == '--profile' else ''}.",
            f"Add {f'{name}:MIN:OPT:MAX to it, after a comma' if option == '--profile' else remedy}.",
        )
    low, best, high = zip(*ranges, strict=True) if ranges else ((), (), ())
    return EngineProfile(name, low, best, high)


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
