"""Replace recognised SRUs in a model, so that their gates can be watched, injected and exported."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from scconv_deploy.errors import ModelError, first_line
from scconv_deploy.gate.planes import as_planes, from_planes
from scconv_deploy.gate.recognize import Recognition, RecognizedSRU
from scconv_deploy.records.gates import Refusal


class StandIn(nn.Module):
    """Replacement of a module in a copy of its model; all attributes of the module can still be read.

    Parameters, buffers and children are the module's own under their own names, other attributes are looked up in it,
    its methods and properties work on this object, and ``isinstance`` takes this object for one of its class.

    Args:
        original: the module that is replaced.
        state: the module whose parameters, buffers and children it holds: the original, or a copy.
    """

    def __init__(self, original: nn.Module, state: nn.Module | None = None) -> None:
        super().__init__()
        self._original = (original,)  # in a tuple, so that it is no submodule
        holder = state or original
        self._parameters = dict(holder._parameters)
        self._buffers = dict(holder._buffers)
        self._modules = dict(holder._modules)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """The class that isinstance sees besides the type; torch.export derives proxies of shared modules from it."""
        found = self.__dict__.get("_original")
        return type(self) if found is None else _class_of(type(self), type(found[0]))  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_original":  # not set yet
                raise
        original = self._original[0]
        found = inspect.getattr_static(type(original), name, None)
        if hasattr(type(found), "__get__") and name not in vars(original):
            return found.__get__(self, type(original))
        return getattr(original, name)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by the real type: ``__class__`` names another one."""
        return _empty, (type(self),), dict(vars(self))

    def __deepcopy__(self, memo: dict[int, Any]) -> StandIn:
        """The original is shared, not copied: it is only read."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo[id(self._original)] = self._original
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied


def _empty(kind: type[StandIn]) -> StandIn:
    """An instance without attributes, for the unpickler."""
    return kind.__new__(kind)


@functools.lru_cache(maxsize=256)
def _class_of(stand_in: type, original: type) -> type:
    """A subclass of both, in which the stand-in's methods come first."""
    if issubclass(original, torch.jit.ScriptModule):  # its metaclass would compile the subclass
        return original
    names = {"__module__": original.__module__, "__qualname__": original.__qualname__}
    return type(original.__name__, (stand_in, original), names)


class SwappedSRU(StandIn):
    """An SRU whose gate can be watched and injected; otherwise it computes what the module computed.

    Attributes:
        path: the site's name.
        gate: the gate, with its parameters.
        on_gate: if set, called with the path and the gate's input as ``[N, C, H, W]`` (:mod:`.planes`); a mask that
            it returns is used instead of the computed one.
        on_output: if set, called with the same; what it returns is the output of the gate, which is not computed.
        on_call: if set, called with the path; the module itself then computes the output.
    """

    def __init__(self, found: RecognizedSRU) -> None:
        super().__init__(found.module)
        vars(self).update(conv=found.conv)  # past nn.Module, which would register it a second time
        self.path = found.path
        self.gate = found.gate
        self.conv_place = found.conv_place
        self.on_gate: Callable[[str, Tensor], Tensor | None] | None = None
        self.on_output: Callable[[str, Tensor], Tensor] | None = None
        self.on_call: Callable[[str], None] | None = None

    def _gated(self, x: Tensor) -> Tensor:
        planes = as_planes(x)
        if self.on_output is not None:
            return from_planes(self.on_output(self.path, planes), x)
        mask = self.on_gate(self.path, planes) if self.on_gate is not None else None
        return from_planes(self.gate.apply(planes, mask), x)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """One tensor by position or by name, as recognition saw it."""
        if self.on_call is not None:
            self.on_call(self.path)
            return self._original[0](*args, **kwargs)
        (x,) = (*args, *kwargs.values())
        if self.conv is not None and self.conv_place == "before":
            return self._gated(self.conv(x))
        y = self._gated(x)
        return self.conv(y) if self.conv is not None and self.conv_place == "after" else y


def site_name(path: str, call: int) -> str:
    """Name of a site: the module's path, and from the second call on its number, ``path#2``; calls count from 1."""
    return path if call == 1 else f"{path}#{call}"


def swap(model: nn.Module, recognition: Recognition) -> nn.Module:
    """A copy of the model that shares its tensors, with each recognised SRU replaced by a :class:`SwappedSRU`."""
    return replace_modules(model, {id(found.module): SwappedSRU(found) for found in recognition.srus})


def swap_reachable(
    model: nn.Module, recognition: Recognition, run: Callable[[nn.Module], object], first: object = None
) -> tuple[Recognition, nn.Module]:
    """Swap those SRUs that the model keeps calling and treats as before, and leave the others alone with a reason.

    A model may hold a reference of its own to an SRU (a closure, a list), which a swap cannot reach, or look at the
    SRU's type. So the model is run with each SRU replaced by a stand-in that calls the SRU: the outputs must be the
    same to the bit.

    Args:
        run: runs a model on the example inputs; its exceptions pass through where no SRU causes them.
        first: what it returned for the model before; None where it has not run.

    Returns:
        what was swapped and what was not, and the swapped model.
    """
    refused = list(recognition.refused)
    kept = list(recognition.srus)
    expected = _repeatable(model, run, first) if kept else None
    while kept:
        attempt = Recognition(tuple(kept), tuple(refused))
        swapped = swap(model, attempt)
        try:
            reached, found = _called(swapped, run)
            reasons = {f.path: _UNREACHED for f in kept if f.path not in reached}
            if not reasons and expected is not None and not _same(found, expected):
                reasons = _misfits(model, kept, run, expected) or {f.path: _TREATED for f in kept}
            if not reasons:
                run(swapped)
        except Exception:  # the user's own code fails with a stand-in: find out with which
            reasons = _misfits(model, kept, run, expected)
            if not reasons:
                raise
        if not reasons:
            return attempt, swapped
        refused += [Refusal(path, reason) for path, reason in reasons.items()]
        kept = [found for found in kept if found.path not in reasons]
    return Recognition((), tuple(refused)), swap(model, Recognition())


_UNREACHED = "the model calls it through a reference of its own (a closure, a list), which a swap cannot reach"
_TREATED = "the model computes something else when another module stands in its place (it may look at its type)"


def _repeatable(model: nn.Module, run: Callable[[nn.Module], object], first: object) -> object:
    """The model's outputs; None where it gives others on the same inputs.

    Args:
        first: outputs of an earlier run, of which hooks may have made something else; None where there are none.
    """
    outputs = run(model)
    same = first is not None and _same(outputs, first)
    return outputs if same or _same(run(model), outputs) else None


def _same(found: object, expected: object) -> bool:
    """Whether two outputs agree to the bit; a NaN equals a NaN."""
    (one, form), (other, expected_form) = pytree.tree_flatten(found), pytree.tree_flatten(expected)
    return form == expected_form and all(_same_leaf(a, b) for a, b in zip(one, other, strict=True))


def _same_leaf(found: Any, expected: Any) -> bool:
    try:
        if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
            return type(found) is type(expected) and bool(found == expected)
        if (found.dtype, found.shape, found.layout) != (expected.dtype, expected.shape, expected.layout):
            return False
        if found.is_quantized:
            return bool(torch.equal(found, expected))
        found, expected = found.to_dense(), expected.to_dense()
        return bool(torch.equal(found.nan_to_num(), expected.nan_to_num()))
    except Exception:  # of a type that cannot be compared
        return False


def _called(swapped: nn.Module, run: Callable[[nn.Module], object]) -> tuple[set[str], object]:
    """Paths of the SRUs that the model calls, and its outputs with each stand-in calling its original."""
    reached: set[str] = set()
    modules = [m for m in swapped.modules() if isinstance(m, SwappedSRU)]
    for module in modules:
        module.on_call = reached.add
    try:
        return reached, run(swapped)
    finally:
        for module in modules:
            module.on_call = None


def _misfits(
    model: nn.Module,
    srus: list[RecognizedSRU],
    run: Callable[[nn.Module], object],
    expected: object,
) -> dict[str, str]:
    """Reasons by SRU why the model does not work with a stand-in, tried one SRU at a time."""
    reasons = {}
    for found in srus:
        swapped = swap(model, Recognition((found,)))
        try:
            run(swapped)
            _, outputs = _called(swapped, run)
        except Exception as error:  # see swap_reachable
            reasons[found.path] = f"the model does not run with it swapped: {type(error).__name__}: {first_line(error)}"
            continue
        if expected is not None and not _same(outputs, expected):
            reasons[found.path] = _TREATED
    return reasons


def replace_modules(
    model: nn.Module, replacements: Mapping[int, nn.Module], *, share_tensors: bool = True
) -> nn.Module:
    """A copy of the model with modules replaced wherever they are registered.

    Args:
        replacements: ``id`` of a module -> its replacement, which is not copied.
        share_tensors: parameters and buffers are the model's own, not copies.

    Raises:
        ModelError: something in the model cannot be copied.
    """
    shared = (*model.parameters(), *model.buffers()) if share_tensors else ()
    memo: dict[int, Any] = {id(t): t for t in shared}
    # deepcopy takes the memo's entry for an object as its copy: so each module is replaced in every place
    memo.update(replacements)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the __deepcopy__ of what a user's module holds raises
        raise ModelError(
            f"The model cannot be copied: {type(error).__name__}: {error}",
            "Keep open files, locks and tensors with a history out of its attributes.",
        ) from error
