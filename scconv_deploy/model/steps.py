"""Comparisons and roundings of a PyTorch model outside known SRUs: recorded, and replaced by given decisions.

Whatever the model computes with the result, the result is a step of its operands. They are seen at torch's dispatcher,
so that no code of the model need be known; those of constants alone are the same in every run and are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.cut import tau
from scconv_deploy.gate.other_gates import STEPS, OtherGate, View, channel_axes, is_other
from scconv_deploy.gate.swap import SwappedSRU, site_name
from scconv_deploy.model.dispatch import EagerMode, tensors_in
from scconv_deploy.model.step_operators import (
    APART,
    COMPARISONS,
    FAKE_QUANTIZE,
    IN_PLACE,
    QUOTIENTS,
    REMAINDERS,
    kind_of,
)

_SAME_STEPS = "Let its forward take the same steps in each run: no random branch, and no size that depends on values."
_ON_ARGUMENT = {"ge": (">=", "ge"), "gt": (">", "ge"), "lt": (">=", "lt"), "le": (">", "lt")}
"""``sigmoid(z) OP t`` as a comparison of z with tau, see :mod:`scconv_deploy.rewrite.rules.sigmoid_threshold`."""
_ARGUMENT = "argument"
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Operand:
    """Operand of a gate: kind, margin and scale as in :class:`..other_gates.View`, as tensors."""

    kind: str
    margin: Tensor
    scale: Tensor


@dataclass(eq=False)
class Steps:
    """Gates recorded in one run, in the order of the calls.

    Attributes:
        decided: by name.
        operands: by name; two for a threshold on a sigmoid.
        paused: while it is set, nothing is recorded.
    """

    decided: dict[str, Tensor] = field(default_factory=dict)
    operands: dict[str, tuple[Operand, ...]] = field(default_factory=dict)
    paused: bool = False

    def outside(self, function: Callable[P, R]) -> Callable[P, R]:
        """A function that is no part of the model, called while it runs."""

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            before, self.paused = self.paused, True
            try:
                return function(*args, **kwargs)
            finally:
                self.paused = before

        return call

    def same_gates(self, other: Steps) -> bool:
        """Whether two runs have the same gates, in the same order and of the same shapes."""
        return [(n, d.shape) for n, d in self.decided.items()] == [(n, d.shape) for n, d in other.decided.items()]

    def same_decisions(self, other: Steps) -> bool:
        return all(torch.equal(decided, other.decided[name]) for name, decided in self.decided.items())

    @property
    def margins(self) -> dict[str, Tensor]:
        """Every margin, under the name that :func:`fixed` reports."""
        return {
            margin_name(name, index): operand.margin
            for name, operands in self.operands.items()
            for index, operand in enumerate(operands)
        }

    def gates(self, noise: Mapping[str, Tensor], errors: Mapping[str, float]) -> dict[str, OtherGate]:
        """As arrays.

        Args:
            noise: the largest ``|float32 - float64|`` by channel, by the names of :attr:`margins`.
            errors: norm of the same.
        """
        found = {}
        for name, operands in self.operands.items():
            views = []
            for index, operand in enumerate(operands):
                key, scale = margin_name(name, index), operand.scale
                size = float(scale.double().expand(operand.margin.shape).norm())
                error = errors[key] / size if key in errors and size else None
                measured = noise[key].float().numpy() if key in noise else None
                views.append(View(operand.kind, operand.margin.numpy(), scale.numpy(), measured, error))
            decided = self.decided[name]
            decided = decided.bool() if operands[0].kind in COMPARISONS else decided.float()
            found[name] = OtherGate(name, operands[0].kind, decided.numpy(), tuple(views))
        return found


def margin_name(name: str, index: int) -> str:
    """Name of the margin of a gate's view in :attr:`Steps.margins` and :func:`fixed`."""
    return name if index == 0 else f"{name}::{_ARGUMENT}"


@contextmanager
def recording(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    known: Collection[nn.Module] = (),
    decided: Mapping[str, Tensor] | None = None,
) -> Iterator[Steps]:
    """Record the gates of a model that runs within.

    Args:
        tensors: its inputs; what does not depend on them is no gate.
        known: modules whose gates are known otherwise; those of a :class:`SwappedSRU` always are.
        decided: decisions to take instead of the model's own, by name.

    Raises:
        ModelError: the model comes to a gate that is not decided, or of another shape.
    """
    steps = Steps()

    def on_step(name: str, operands: Callable[[], tuple[Operand, ...]], own: Tensor) -> Tensor:
        result = own if decided is None else _given(decided, name, own)
        steps.decided[name] = result.clone()
        steps.operands[name] = operands()
        return result

    with module_scope(model, known) as scope, _Watch(tensors, scope, steps, on_step):
        yield steps


def fixed(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    decided: Mapping[str, Tensor],
    watch: Callable[[str, Tensor], None] = lambda name, margin: None,
    free: Mapping[str, Callable[[Operand], Tensor]] | None = None,
) -> AbstractContextManager[object]:
    """Put given decisions into the gates of a model that runs within.

    Args:
        decided: by name; other names are passed over.
        watch: told the margins, by the names of :attr:`Steps.margins`.
        free: what decides gates that are not fixed, by name.
    """
    if not any(map(is_other, decided)) and not free:
        return nullcontext()
    return _fixed(model, tensors, decided, watch, free or {})


@contextmanager
def _fixed(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    decided: Mapping[str, Tensor],
    watch: Callable[[str, Tensor], None],
    free: Mapping[str, Callable[[Operand], Tensor]],
) -> Iterator[None]:
    def on_step(name: str, operands: Callable[[], tuple[Operand, ...]], own: Tensor) -> Tensor:
        seen = operands()
        for index, operand in enumerate(seen):
            watch(margin_name(name, index), operand.margin)
        if name in free:
            return free[name](seen[0]).to(own.dtype)
        return _given(decided, name, own)

    with module_scope(model, ()) as scope, _Watch(tensors, scope, Steps(), on_step):
        yield


def _given(decided: Mapping[str, Tensor], name: str, own: Tensor) -> Tensor:
    if name not in decided:
        raise ModelError(f"The model comes to a comparison that it did not come to before: {name}.", _SAME_STEPS)
    given = decided[name]
    if given.shape != own.shape:
        raise ModelError(f"{name} has shape {list(own.shape)}, before it had {list(given.shape)}.", _SAME_STEPS)
    return given.to(own.dtype, copy=True)  # code in the wild writes into its masks in place


def disturbed(operand: Operand, size: Tensor, generator: torch.Generator) -> Tensor:
    """Decisions of a gate whose margin is off by noise of this size, which broadcasts to it."""
    noise = torch.randn(operand.margin.shape, generator=generator)
    margin = operand.margin + noise * size
    step = STEPS[operand.kind]
    return step(margin) if operand.kind in COMPARISONS else torch.from_numpy(step(margin.numpy()))


@dataclass
class Scope:
    """Position of a run in the model: paths of the modules entered, and how many of them are known SRUs."""

    paths: list[str] = field(default_factory=list)
    known: int = 0


@contextmanager
def module_scope(model: nn.Module, known: Collection[nn.Module] = ()) -> Iterator[Scope]:
    """Follow a run through the modules.

    Hooks of all modules, not of the model's: a module's own hooks turn off torch's fast paths, which do not all
    compute the same (nn.TransformerEncoderLayer).
    """
    scope = Scope()
    paths = {id(module): path for path, module in model.named_modules()}
    closed = {id(m) for m in known} | {id(m) for m in model.modules() if isinstance(m, SwappedSRU)}

    def enter(module: nn.Module, args: object) -> None:
        if id(module) in paths:
            scope.paths.append(paths[id(module)])
            scope.known += id(module) in closed

    def leave(module: nn.Module, args: object, output: object) -> None:
        if id(module) in paths:
            scope.paths.pop()
            scope.known -= id(module) in closed

    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave, always_call=True)
    try:
        yield scope
    finally:
        before.remove()
        after.remove()


class _Watch(EagerMode):
    """Mode that sees every operator of a run, and which tensors depend on the model's inputs."""

    def __init__(
        self,
        inputs: Mapping[str, Tensor],
        scope: Scope,
        steps: Steps,
        on_step: Callable[[str, Callable[[], tuple[Operand, ...]], Tensor], Tensor],
    ) -> None:
        super().__init__()
        self._scope, self._steps, self._on_step = scope, steps, on_step
        self._data = {_storage(tensor) for tensor in inputs.values()}
        self._calls: Counter[str] = Counter()
        self._sigmoids = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in APART:
            with self:
                return _decomposition(func)(*args, **kwargs)
        before = (args[0].clone(), *args[1:]) if func in IN_PLACE else args
        output = func(*args, **kwargs)
        if not self._follow(func, args, kwargs, output) or self._steps.paused:
            return output
        if func in FAKE_QUANTIZE:  # also of a convolution inside an SRU
            return self._quantized(args, output)
        if self._scope.known:
            return output
        if func is torch.ops.aten.sigmoid.default:
            self._sigmoids[output] = args[0]
            return output
        if func in REMAINDERS and output.is_floating_point():
            return self._remainder(REMAINDERS[func], args, output)
        kind = kind_of(func, args, kwargs, output)
        if kind is None:
            return output
        decided = self._decide(kind, lambda: self._operands(func, kind, before), output)
        return output.copy_(decided) if func in IN_PLACE else decided

    def _remainder(self, kind: str, args: Any, output: Tensor) -> Tensor:
        """``a - q * b``, which jumps where the quotient's rounding does."""
        quotient = torch.div(args[0], args[1], rounding_mode=kind)
        decided = self._decide(kind, lambda: (_quotient(kind, args),), quotient)
        if torch.equal(decided, quotient):
            return output
        given = args[0] - decided * args[1]
        self._data.add(_storage(given))
        return given

    def _quantized(self, args: Any, output: Any) -> Any:
        """Codes less the zero point, as a rounding of ``x / scale`` that is cut off at the first and last code."""
        rounded = output if isinstance(output, Tensor) else output[0]
        x, scale, zero, low, high = args[:5]
        inverse = torch.tensor(1.0) / torch.tensor(scale)  # in float32, as the operator computes it

        def operands() -> tuple[Operand, ...]:
            return (_operand("round", (x * inverse).clamp(low - zero, high - zero), 0.0),)

        own = torch.round(rounded * inverse)
        decided = self._decide("round", operands, own, "code")
        if torch.equal(decided, own):
            return output
        given = (decided.float() * torch.tensor(scale)).to(x.dtype)
        self._data.add(_storage(given))
        return given if isinstance(output, Tensor) else (given, output[1])

    def _decide(self, kind: str, operands: Callable[[], tuple[Operand, ...]], own: Tensor, label: str = "") -> Tensor:
        path = self._scope.paths[-1] if self._scope.paths else ""
        name = f"{path or 'model'}::{label or kind}"
        self._calls[name] += 1
        decided = self._on_step(site_name(name, self._calls[name]), operands, own)
        self._data.add(_storage(decided))
        return decided

    def _follow(self, func: Any, args: Any, kwargs: Any, output: Any) -> bool:
        """Whether this call depends on the inputs; its outputs then do, and what it writes into."""
        depends = any(_storage(tensor) in self._data for tensor in tensors_in(*args, *kwargs.values()))
        made = {_storage(tensor) for tensor in tensors_in(output)}
        if not depends:  # a new tensor may stand where an old one stood
            self._data -= made
            return False
        if func._schema.is_mutable:
            given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
            written = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
            made |= {_storage(tensor) for name in written for tensor in tensors_in(given.get(name))}
        self._data |= made
        return True

    def _operands(self, func: Any, kind: str, args: Any) -> tuple[Operand, ...]:
        if func in QUOTIENTS:
            return (_quotient(kind, args),)
        a, b = args[0], args[1] if kind in COMPARISONS and len(args) > 1 else 0.0
        found = [_operand(kind, a, b)]
        z = self._sigmoids.get(a) if isinstance(a, Tensor) else None
        number = float(b) if not isinstance(b, Tensor) else float(b) if b.numel() == 1 and not self._moves(b) else None
        if z is not None and number is not None and kind in _ON_ARGUMENT:
            comparison, on_argument = _ON_ARGUMENT[kind]
            bound = tau(number, comparison)
            if abs(bound) != float("inf"):
                found.append(_operand(on_argument, z, bound))
        return tuple(found)

    def _moves(self, tensor: Tensor) -> bool:
        return _storage(tensor) in self._data


def _quotient(kind: str, args: Any) -> Operand:
    a, b = args[0], args[1]
    return _operand(kind, torch.div(a, b), 0.0)


def _operand(kind: str, a: Any, b: Any) -> Operand:
    wide = torch.float64 if any(isinstance(t, Tensor) and t.dtype == torch.float64 for t in (a, b)) else torch.float32
    one, other = (torch.as_tensor(value).detach().to(wide) for value in (a, b))
    margin = one - other if kind in COMPARISONS else one.clone()
    size = (one.abs() + other.abs()).expand(margin.shape)
    size = torch.where(torch.isfinite(size), size, 0.0)
    return Operand(kind, margin, largest_of_channel(size).float())


def largest_of_channel(values: Tensor) -> Tensor:
    """The largest entry of each channel (axis 1), axes kept."""
    axes = channel_axes(values.dim())
    return values.amax(axes, keepdim=True) if axes and values.numel() else values


@cache
def _decomposition(func: Any) -> Callable[..., Any]:
    from torch._decomp import get_decompositions  # takes seconds, and few models need it

    return get_decompositions([func])[func]


def _storage(tensor: Tensor) -> int:
    """Identity of the storage that views of one tensor share."""
    return tensor.untyped_storage()._cdata if tensor.layout == torch.strided else id(tensor)
