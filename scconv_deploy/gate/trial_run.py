"""Run a candidate on a probe, with everything refused that would make the run say nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from scconv_deploy.gate.candidates import Candidate, ConvPlace
from scconv_deploy.gate.flips import relative_l2
from scconv_deploy.records.gates import VALUE_TOLERANCE


class NotIdentifiedError(Exception):
    """Why no hypothesis, or not the tested one, explains a module: a reason for the report, not a user's error."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DoesNotRunError(NotIdentifiedError):
    """The module cannot run on a probe."""


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Refuse a module whose probing changed its buffers, and put them back."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        changed = [n for n, b in module.named_buffers() if not torch.equal(b.nan_to_num(), before[n].nan_to_num())]
        for name in changed:
            module.get_buffer(name).copy_(before[name])
    if changed:
        raise NotIdentifiedError(f"it changes its buffer {changed[0]} when it runs")


def run_gate(candidate: Candidate, place: ConvPlace, name: str, x: Tensor, recorded: Tensor) -> Tensor:
    """Output of the module's gate for x, the gate's own input; the module's convolution is bypassed."""
    if place == "none" or candidate.conv is None:
        return run(candidate, name, x)
    seen: list[Tensor] = []

    def feed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        seen.append(x)
        return x.clone()

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].clone())

    conv = candidate.conv
    handle = conv.register_forward_hook(feed) if place == "before" else conv.register_forward_pre_hook(watch)
    try:
        y = run(candidate, name, recorded if place == "before" else x)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise NotIdentifiedError("its convolution is not called once, as a module, so that its gates cannot be probed")
    if place == "before":
        return y
    require_near(relative_l2(y, conv(seen[0])), f"after its convolution on {name}")
    return seen[0]


def run(candidate: Candidate, name: str, x: Tensor) -> Tensor:
    """Output of the module for a copy of x.

    Raises:
        DoesNotRunError: it raises anything.
        NotIdentifiedError: it returns no tensor, or writes into its input.
    """
    given = x.clone()
    try:
        y = candidate.module(given)
    except Exception as error:  # the user's own code: whatever it raises is the reason
        raise DoesNotRunError(f"on {name} it raises {type(error).__name__}: {error}") from error
    if not isinstance(y, Tensor):
        raise NotIdentifiedError(f"on {name} it returns {type(y).__name__}, not a tensor")
    if not torch.equal(given, x):
        raise NotIdentifiedError("it writes into its input")
    return y


def require_near(distance: float, where: str) -> None:
    """Refuse a relative L2 above the tolerance (NotIdentifiedError)."""
    if not distance <= VALUE_TOLERANCE:  # not (>), so that NaN is refused
        raise NotIdentifiedError(f"values differ by {distance:.1e} relative L2 {where}")
