"""Check torch.export's guards on open axes against the declared sizes.

torch.export traces one size of an open axis and records every condition that the graph depends on (a *guard*:
``size % 2 == 0``, ``size <= 2``). Its own solver gives up on many guards and narrows the range silently. Here each
guard is evaluated for every declared size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import sympy
from torch.utils._sympy.printers import PythonPrinter

from scconv_deploy.errors import ModelError
from scconv_deploy.model.inputs import DynamicAxis

_MOST_SIZES = 2**20
"""Most sizes of one axis that are all tried. Of more: both ends, a seeded choice, and the numbers in the guards."""
_MOST_PAIRED = 1024
"""The same for each of two axes in one guard."""
_LARGEST_EXACT = 2**24
"""Largest size for which products of two sizes and a channel count are exact in int64."""
_STEPS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 48, 64, 96, 128, 256)


@dataclass(frozen=True)
class Guard:
    """A condition on sizes that a traced graph depends on.

    Attributes:
        expression: in the symbols of the trace.
        module: path of the module whose code made it; "" if unknown. ``line`` is that of the user's code.
        internal: whether torch's own code made it, not the model's.
    """

    expression: sympy.Basic
    module: str = ""
    line: str = ""
    internal: bool = False

    @property
    def where(self) -> str:
        found = [f"module {self.module}"] if self.module else []
        found += [self.line] if self.line else []
        return f" ({', '.join(found)})" if found else ""

    @property
    def is_about_one(self) -> bool:
        """Whether it is torch's own test that a size is not 1, made for strides and broadcasting."""
        return self.internal and isinstance(self.expression, sympy.Ne) and sympy.Integer(1) in _sides(self.expression)


@dataclass(frozen=True)
class OpenSizes:
    """The open axes of one symbol.

    Attributes:
        axes: all axes with the symbol.
        traced: the size of the trace.
        names: of the symbol in the trace, one for each tensor that has it.
    """

    axes: tuple[DynamicAxis, ...]
    traced: int
    names: tuple[sympy.Symbol, ...]

    @property
    def axis(self) -> DynamicAxis:
        return self.axes[0]

    @property
    def words(self) -> str:
        return _name(self.axis)

    def sizes(self, most: int = _MOST_SIZES, named: Sequence[int] = ()) -> np.ndarray:
        """The declared sizes, int64, or about ``most`` of them, with those around ``named``."""
        axis = self.axis
        first = -(-axis.minimum // axis.step)
        count = axis.maximum // axis.step - first + 1
        if count <= most:
            return (first + np.arange(count, dtype=np.int64)) * axis.step
        drawn = np.random.default_rng(0).integers(0, count, most // 2)
        ends = np.arange(most // 4)
        near = [size // axis.step - first + d for size in named for d in (-1, 0, 1)]
        index = np.concatenate([ends, count - 1 - ends, drawn, np.asarray(near, dtype=np.int64)])
        return (first + np.unique(index[(index >= 0) & (index < count)])) * axis.step


def check_guards(guards: Sequence[Guard], opened: Sequence[OpenSizes]) -> list[list[int]]:
    """Check that every guard holds for all declared sizes.

    Returns:
        Sizes of the symbols of ``opened`` at which a guard about 1 fails: torch takes another way there, mostly to the
        same result. The output shapes must be checked there.

    Raises:
        ModelError: a guard fails; it names the axis, the guard, its place, and the range that would hold.
    """
    owner = {name: sizes for sizes in opened for name in sizes.names}
    alone: dict[int, list[Guard]] = {}
    together: list[tuple[Guard, list[OpenSizes]]] = []
    doubtful: list[list[int]] = []
    for guard in dict.fromkeys(guards):
        involved = [owner.get(symbol) for symbol in guard.expression.free_symbols]
        if None in involved or not involved:
            continue  # on sizes that depend on values: the graph computes them as PyTorch does
        kept = [sizes for sizes in opened if sizes in involved]
        if guard.is_about_one:
            doubtful += _counterexample(guard, opened, kept)
        elif len(kept) == 1:
            alone.setdefault(id(kept[0]), []).append(guard)
        elif not _holds(guard, kept):
            together.append((guard, kept))
    for sizes in opened:
        _check_alone(sizes, alone.get(id(sizes), []))
    for guard, kept in together:
        raise _together(guard, kept)
    return doubtful


def _sides(expression: sympy.Ne) -> list[sympy.Basic]:
    """Both sides of ``!=`` without a common factor: ``8*n != 8`` is ``n != 1``."""
    left, right = (sympy.Integer(side) if side.is_number else side for side in expression.args)
    if right.is_number and right > 1:
        factor = left.as_coeff_Mul()[0]
        return [left, right // factor] if factor == right else [left, right]
    return [left, right]


def _counterexample(guard: Guard, opened: Sequence[OpenSizes], involved: Sequence[OpenSizes]) -> list[list[int]]:
    """The first sizes at which a guard fails, the other symbols as in the trace; empty if it holds."""
    grids = _grids(guard, involved)
    found = _evaluate(guard.expression, _values(involved, grids)).reshape(-1)
    if found.all():
        return []
    index = int(np.argmin(found))
    at = {sizes.axis.symbol: int(grid.reshape(-1)[index]) for sizes, grid in zip(involved, grids, strict=True)}
    return [[at.get(sizes.axis.symbol, sizes.traced) for sizes in opened]]


# --- one symbol ----------------------------------------------------------------------------------------------------


def _check_alone(opened: OpenSizes, guards: Sequence[Guard]) -> None:
    named = [n for guard in guards for n in _numbers(guard.expression)]
    sizes = opened.sizes(named=named)
    hold = np.ones(len(sizes), dtype=bool)
    broken: list[Guard] = []
    for guard in guards:
        found = _evaluate(guard.expression, dict.fromkeys(opened.names, sizes))
        if not found.all():
            broken.append(guard)
            hold &= found
    if not broken:
        return
    # the guard that holds for the fewest sizes explains most
    guard = min(broken, key=lambda g: int(_evaluate(g.expression, dict.fromkeys(opened.names, sizes)).sum()))
    axis, condition = opened.axis, in_words(guard, [opened])
    kept = _narrowed(opened, sizes, hold)
    if kept is None:
        raise ModelError(
            f"{_title(axis)} was declared dynamic, but the model's code fixes it to {opened.traced}"
            f"{_unless_plain(guard, condition)}{guard.where}.",
            "Leave it static, or make the code independent of it.",
        )
    failing = int(sizes[~hold][0])
    multiples = f" (multiples of {kept.step})" if kept.step > axis.step else ""
    raise ModelError(
        f"{_title(axis)} was declared dynamic from {axis.minimum} to {axis.maximum}, but the graph traced at "
        f"{opened.traced} holds only where {condition}{guard.where}; it fails for {failing}.",
        f"Declare a range that holds, {option([_within(a, kept) for a in opened.axes])}{multiples}, "
        "or make the code independent of it.",
    )


def _narrowed(opened: OpenSizes, sizes: np.ndarray, hold: np.ndarray) -> DynamicAxis | None:
    """The larger part of a range that holds: multiples of a step, or a run around the traced size; None if neither."""
    axis, traced = opened.axis, opened.traced
    at = int(np.searchsorted(sizes, traced))
    left = at - int(np.argmin(hold[at::-1])) + 1 if not hold[: at + 1].all() else 0
    right = at + int(np.argmin(hold[at:])) - 1 if not hold[at:].all() else len(sizes) - 1
    low, high = int(sizes[left]), int(sizes[right])
    best, most = None, 1
    if right > left:
        best = replace(axis, minimum=low, optimum=min(max(axis.optimum, low), high), maximum=high)
        most = right - left + 1
    for step in _STEPS:
        if step <= axis.step or step % axis.step or traced % step:
            continue
        at_step = sizes % step == 0
        if hold[at_step].all() and at_step.sum() > most:
            low, high = int(sizes[at_step][0]), int(sizes[at_step][-1])
            return replace(axis, minimum=low, optimum=traced, maximum=high, step=step)
    return best


def _within(axis: DynamicAxis, kept: DynamicAxis) -> DynamicAxis:
    """An axis with another's range."""
    return replace(axis, minimum=kept.minimum, optimum=kept.optimum, maximum=kept.maximum, step=kept.step)


# --- several -------------------------------------------------------------------------------------------------------


def _together(guard: Guard, opened: Sequence[OpenSizes]) -> ModelError:
    condition, axes = in_words(guard, opened), [sizes.axis for sizes in opened]
    names = " and ".join(_name(axis) for axis in axes)
    each = f"each was declared dynamic on its own{guard.where}"
    if len(opened) == 2 and isinstance(guard.expression, sympy.Eq) and all(a.is_Symbol for a in guard.expression.args):
        low, high = max(a.minimum for a in axes), min(a.maximum for a in axes)
        step = reduce(np.lcm, [a.step for a in axes])
        one = [
            replace(a, minimum=low, optimum=opened[0].traced, maximum=high, step=int(step))
            for sizes in opened
            for a in sizes.axes
        ]
        remedy = "Leave one of them static."
        if all(axis.input is not None for axis in one) and low <= opened[0].traced <= high:
            remedy = f"Declare them as one, {option(one)}, or leave them static."
        return ModelError(f"{names} must be equal, but {each}.", remedy)
    steps = [step for step in _STEPS if _holds(guard, [_in_steps(sizes, step) for sizes in opened])]
    steps = [step for step in steps if not any(sizes.traced % step for sizes in opened)]
    remedy = "Leave all of them but one static, or make the code independent of their sizes."
    if steps:
        options = " ".join(option([_in_steps(sizes, steps[0]).axis]) for sizes in opened)
        remedy = f"Declare ranges that hold, {options} (multiples of {steps[0]}), or make the code independent of them."
    return ModelError(f"{names}: the traced graph holds only where {condition}, but {each}.", remedy)


def _in_steps(opened: OpenSizes, step: int) -> OpenSizes:
    axis = opened.axis
    step = int(np.lcm(step, axis.step))
    low, high = -(-axis.minimum // step) * step, axis.maximum // step * step
    return replace(opened, axes=(replace(axis, minimum=low, maximum=high, step=step), *opened.axes[1:]))


def _holds(guard: Guard, opened: Sequence[OpenSizes]) -> bool:
    return bool(_evaluate(guard.expression, _values(opened, _grids(guard, opened))).all())


def _grids(guard: Guard, opened: Sequence[OpenSizes]) -> list[np.ndarray]:
    """All combinations of the declared sizes, or a selection where they are too many."""
    most = {1: _MOST_SIZES, 2: _MOST_PAIRED}.get(len(opened), 64)
    named = _numbers(guard.expression)
    return list(np.meshgrid(*(sizes.sizes(most, named) for sizes in opened), indexing="ij"))


def _values(opened: Sequence[OpenSizes], grids: Sequence[np.ndarray]) -> dict[sympy.Symbol, np.ndarray]:
    return {name: grid for sizes, grid in zip(opened, grids, strict=True) for name in sizes.names}


# --- expressions ---------------------------------------------------------------------------------------------------


def _numbers(expression: sympy.Basic) -> list[int]:
    """Integers in an expression, and their quotients: sizes near which its value may change."""
    found = {abs(int(n)) for n in expression.atoms(sympy.Integer)}
    return sorted(found | {a // b for a in found for b in found if b})


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "FloorDiv": np.floor_divide,
    "CleanDiv": np.floor_divide,
    "CeilDiv": lambda a, b: -np.floor_divide(-a, b),
    "Mod": np.mod,
    "PythonMod": np.mod,
    "ModularIndexing": lambda a, b, c: np.mod(np.floor_divide(a, b), c),
    "IntTrueDiv": np.true_divide,
    "FloatTrueDiv": np.true_divide,
    "PowByNatural": np.power,
    "FloatPow": np.power,
    "ToFloat": lambda a: np.asarray(a, dtype=np.float64),
    "TruncToFloat": np.trunc,
    "TruncToInt": lambda a: np.trunc(a).astype(np.int64),
    "FloorToInt": lambda a: np.floor(a).astype(np.int64),
    "CeilToInt": lambda a: np.ceil(a).astype(np.int64),
    "RoundToInt": lambda a: np.rint(a).astype(np.int64),
    "RoundDecimal": np.round,
    "Identity": lambda a: a,
    "Where": np.where,
    "Max": lambda *a: reduce(np.maximum, a),
    "Min": lambda *a: reduce(np.minimum, a),
}
"""NumPy forms of torch's functions on sizes, which round as Python does."""


def _evaluate(expression: sympy.Basic, values: Mapping[sympy.Symbol, np.ndarray]) -> np.ndarray:
    """Whether a condition holds, as a bool array over the arrays of its symbols."""
    symbols = [symbol for symbol in values if symbol in expression.free_symbols]
    shape = np.broadcast_shapes(*(values[symbol].shape for symbol in symbols))
    plain = [sympy.Dummy(f"size{index}", integer=True) for index in range(len(symbols))]
    if all(values[symbol].max(initial=0) <= _LARGEST_EXACT for symbol in symbols):
        try:
            function = sympy.lambdify(
                plain, expression.xreplace(dict(zip(symbols, plain, strict=True))), [_OPERATIONS, "numpy"]
            )
            with np.errstate(all="ignore"):
                return np.broadcast_to(np.asarray(function(*(values[s] for s in symbols)), dtype=bool), shape)
        except (NameError, TypeError, AttributeError, ValueError):  # another release may have other operations
            pass
    found = np.ones(shape, dtype=bool)
    columns = [values[symbol].reshape(-1) for symbol in symbols]
    named = np.flatnonzero(np.isin(columns[0], [n + d for n in _numbers(expression) for d in (-1, 0, 1)]))
    for index in np.concatenate([np.linspace(0, found.size - 1, 500, dtype=np.int64), named[:500]]):
        sizes = {s: sympy.Integer(int(column[index])) for s, column in zip(symbols, columns, strict=True)}
        found.reshape(-1)[index] = bool(expression.xreplace(sizes))
    return found


def in_words(guard: Guard, opened: Sequence[OpenSizes]) -> str:
    """The condition in Python's notation, an axis as ``x.shape[3]``."""
    words = {name: sympy.Symbol(_short(sizes.axis), integer=True) for sizes in opened for name in sizes.names}
    text = str(PythonPrinter().doprint(guard.expression.xreplace(words)))
    for call in ("math.", "torch.sym_"):
        text = text.replace(call, "")
    return text


def _unless_plain(guard: Guard, condition: str) -> str:
    """The condition for a message, where it says more than the size itself; else empty."""
    plain = isinstance(guard.expression, sympy.Eq) and all(side.is_Atom for side in guard.expression.args)
    return "" if plain else f": {condition}"


def _short(axis: DynamicAxis) -> str:
    return "batch" if axis.input is None else f"{axis.input}.shape[{axis.axis}]"


def _name(axis: DynamicAxis) -> str:
    return "the batch" if axis.input is None else f"axis {axis.axis} of input {axis.input}"


def _title(axis: DynamicAxis) -> str:
    return "The batch: axis 0" if axis.input is None else f"Input {axis.input}: axis {axis.axis}"


def option(axes: Sequence[DynamicAxis], minimum: int | None = None) -> str:
    """The command line option that declares axes of one symbol, with another minimum if given."""
    first = axes[0] if minimum is None else replace(axes[0], minimum=minimum)
    text = f"{first.minimum}:{first.optimum}:{first.maximum}" + (f":{first.step}" if first.step > 1 else "")
    if first.input is None:
        return f"--batch {text}"
    return f"--dynamic {','.join(f'{a.input}:{a.axis}' for a in axes)}={text}"
