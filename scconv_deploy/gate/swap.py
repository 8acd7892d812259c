"""Replace recognised SRUs in a model, so that their gates can be watched, injected and exported."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from scconv_deploy.errors import ModelError, first_line
from scconv_deploy.gate import variant as pytorch_gate
from scconv_deploy.gate.planes import as_planes, from_planes
from scconv_deploy.gate.recognize import Recognition, RecognizedSRU
from scconv_deploy.outcomes import Refusal


class SwappedSRU(nn.Module):
    """An SRU whose gate can be watched and injected; otherwise it computes what the module computed.

    Attributes:
        path: the site's name.
        on_gate: if set, called with the path and the gate's input as ``[N, C, H, W]`` (:mod:`.planes`); a mask that
            it returns is used instead of the computed one.
    """

    def __init__(self, found: RecognizedSRU) -> None:
        super().__init__()
        self.path = found.path
        self.variant = found.variant
        self.parameters_of_gate = found.parameters
        self.gamma = found.gamma
        self.beta = found.beta
        # float32's, in float64 too: how sum(gamma) was rounded is part of the model, and no noise of a run
        weight = pytorch_gate.gate_weight(found.gamma.detach(), found.variant)
        self.register_buffer("gate_weight", weight, persistent=False)
        self.conv = found.conv
        self.conv_place = found.conv_place
        self.on_gate: Callable[[str, Tensor], Tensor | None] | None = None
        self._original = (found.module,)  # in a tuple, so that it is no submodule

    def __getattr__(self, name: str) -> Any:
        """What a parent reads of the module (its gamma, its number of groups) is still there."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_original":  # not set yet
                raise
            return getattr(self._original[0], name)

    def __deepcopy__(self, memo: dict[int, Any]) -> SwappedSRU:
        """The original is shared, not copied: it is only read."""
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        memo[id(self._original)] = self._original
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def gate(self, x: Tensor) -> Tensor:
        planes = as_planes(x)
        mask = self.on_gate(self.path, planes) if self.on_gate is not None else None
        y = pytorch_gate.sru(planes, self.gamma, self.beta, self.variant, mask, self.gate_weight)
        return from_planes(y, x)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None and self.conv_place == "before":
            return self.gate(self.conv(x))
        y = self.gate(x)
        return self.conv(y) if self.conv is not None and self.conv_place == "after" else y


def site_name(path: str, call: int) -> str:
    """The name of the call-th use (from 1) of the module at a path: of its node, and of what is recorded of it."""
    return path if call == 1 else f"{path}#{call}"


def swap(model: nn.Module, recognition: Recognition) -> nn.Module:
    """A copy of the model that shares its tensors, with each recognised SRU replaced by a :class:`SwappedSRU`."""
    return replace_modules(model, {id(found.module): SwappedSRU(found) for found in recognition.srus})


def swap_reachable(
    model: nn.Module, recognition: Recognition, run: Callable[[nn.Module], object]
) -> tuple[Recognition, nn.Module]:
    """Swap those SRUs that the model keeps calling, and leave the others alone with a reason.

    A model may hold a reference of its own to an SRU (a closure, a list), which a swap cannot reach, or treat it as
    more than a module.

    Args:
        run: runs a model on the example inputs; raises what it raises.

    Returns:
        what was swapped and what was not, and the swapped model.
    """
    refused = list(recognition.refused)
    kept = list(recognition.srus)
    while True:
        attempt = Recognition(tuple(kept), tuple(refused))
        swapped = swap(model, attempt)
        try:
            reached = _called(swapped, run)
            reasons = {f.path: _UNREACHED for f in kept if f.path not in reached}
        except Exception:  # the user's own code, which does not get along with one of them: find out which
            reasons = _misfits(model, kept, run)
            if not reasons:
                raise
        if not reasons:
            return attempt, swapped
        refused += [Refusal(path, reason) for path, reason in reasons.items()]
        kept = [found for found in kept if found.path not in reasons]


_UNREACHED = "the model calls it through a reference of its own (a closure, a list), which a swap cannot reach"


def _called(swapped: nn.Module, run: Callable[[nn.Module], object]) -> set[str]:
    reached: set[str] = set()
    modules = [m for m in swapped.modules() if isinstance(m, SwappedSRU)]

    def on_gate(path: str, x: Tensor) -> None:
        reached.add(path)

    for module in modules:
        module.on_gate = on_gate
    try:
        run(swapped)
    finally:
        for module in modules:
            module.on_gate = None
    return reached


def _misfits(model: nn.Module, srus: list[RecognizedSRU], run: Callable[[nn.Module], object]) -> dict[str, str]:
    reasons = {}
    for found in srus:
        try:
            run(swap(model, Recognition((found,))))
        except Exception as error:  # see swap_reachable
            reasons[found.path] = f"the model does not run with it swapped: {type(error).__name__}: {first_line(error)}"
    return reasons


def replace_modules(
    model: nn.Module, replacements: Mapping[int, nn.Module], *, share_tensors: bool = True
) -> nn.Module:
    """A copy of the model, with modules replaced by identity wherever they are registered.

    Args:
        replacements: ``id`` of a module -> what stands in its place; itself, not a copy.
        share_tensors: parameters and buffers are the model's own, not copies.

    Raises:
        ModelError: something in the model cannot be copied.
    """
    shared = (*model.parameters(), *model.buffers()) if share_tensors else ()
    memo: dict[int, Any] = {id(t): t for t in shared}
    # deepcopy takes what the memo holds for an object as its copy: this is the replacement, at every place at once
    memo.update(replacements)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the __deepcopy__ of what a user's module holds raises
        raise ModelError(
            f"The model cannot be copied: {type(error).__name__}: {error}",
            "Keep open files, locks and tensors with a history out of its attributes.",
        ) from error
