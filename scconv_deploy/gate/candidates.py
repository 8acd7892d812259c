"""Candidates: modules with an SRU's parameters, and the inputs they get in a run of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scconv_deploy.gate.planes import RANKS

_PROBE_BATCH = 2

ROOT = "model"
"""The path of a model that is an SRU itself."""

ConvPlace = Literal["none", "before", "after"]
PointwiseConv = nn.Conv1d | nn.Conv2d | nn.Conv3d
"""A convolution of kernel size 1: it mixes channels and nothing else."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A module whose parameters are one gamma, one beta and at most one convolution of kernel size 1.

    Attributes:
        path: its name in the model.
        affine: gamma and beta, C elements each, in the order of registration.
        conv: the convolution, of one, two or three dimensions; ``conv_places`` says where it may stand.
    """

    path: str
    module: nn.Module
    affine: tuple[nn.Parameter, nn.Parameter]
    conv: PointwiseConv | None
    conv_places: tuple[ConvPlace, ...]


def find_candidates(model: nn.Module) -> Iterator[Candidate]:
    """The candidates of a model, outer modules first; modules of torch.nn are skipped."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn"):
            continue
        convs: list[PointwiseConv] = []
        others: list[nn.Parameter] = []
        for child in module.modules():
            own = list(child.parameters(recurse=False))
            if isinstance(child, PointwiseConv) and set(child.kernel_size) == {1} and child.groups == 1:
                convs.append(child)
            elif own and type(child).__module__.startswith("torch.nn") and not isinstance(child, nn.GroupNorm):
                others = []
                break  # a BatchNorm, Linear, larger convolution ...: not an SRU
            else:
                others.extend(own)
        if len(others) != 2 or len(convs) > 1 or not all(_is_per_channel(p) for p in others):
            continue
        if others[0].numel() != others[1].numel():
            continue
        places: tuple[ConvPlace, ...] = ("before", "after", "none") if convs else ("none",)
        yield Candidate(path or ROOT, module, (others[0], others[1]), convs[0] if convs else None, places)


def has_hooks(candidate: Candidate) -> bool:
    """Whether the module or one inside it has forward hooks, which a node cannot carry; its convolution may have."""
    inside = (m for m in candidate.module.modules() if m is not candidate.conv)
    return any(m._forward_hooks or m._forward_pre_hooks for m in inside if not isinstance(m, torch.jit.ScriptModule))


def _is_per_channel(parameter: nn.Parameter) -> bool:
    return parameter.numel() >= 2 and max(parameter.shape) == parameter.numel()


def record_inputs(
    model: nn.Module, modules: list[nn.Module], run: Callable[[nn.Module], object]
) -> dict[int, Tensor | str]:
    """First input of each module by ``id``, cut to two samples; or why the input of some call cannot be used.

    Args:
        run: runs the model once.
    """
    inputs: dict[int, Tensor | str] = {}

    def record(module: nn.Module, _: nn.Module, called_with: tuple[Any, ...], called_by_name: dict[str, Any]) -> None:
        values = [*called_with, *called_by_name.values()]
        if isinstance(inputs.get(id(module)), str):
            return
        if len(values) != 1 or not isinstance(values[0], Tensor):
            inputs[id(module)] = "it is not called with one tensor [N, C, *]"
        elif values[0].dim() not in RANKS:
            inputs[id(module)] = f"its input {list(values[0].shape)} is not [N, C, *]"
        elif values[0].dtype != torch.float32:
            inputs[id(module)] = f"its input is {values[0].dtype}, not float32"
        elif not values[0].numel():
            inputs[id(module)] = f"its input {list(values[0].shape)} is empty"
        else:
            inputs.setdefault(id(module), values[0][:_PROBE_BATCH].detach().clone())

    with ExitStack() as stack:
        for module, host in zip(modules, stack.enter_context(hookable(model, modules)), strict=True):
            stack.callback(host.register_forward_pre_hook(partial(record, module), with_kwargs=True).remove)
        with torch.no_grad():
            run(model)
    return inputs


class _Host(nn.Module):
    """Wrapper around a scripted module; it takes forward hooks."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


@contextmanager
def hookable(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """The modules in a form that takes forward hooks; scripted ones are wrapped in the model during the block."""
    hosts = {id(m): _Host(m) if isinstance(m, torch.jit.ScriptModule) else m for m in modules}
    places = [
        (parent, name, child)
        for parent in list(model.modules())
        if not isinstance(parent, torch.jit.ScriptModule)
        for name, child in parent._modules.items()
        if child is not None and hosts.get(id(child), child) is not child
    ]
    try:
        for parent, name, child in places:
            parent._modules[name] = hosts[id(child)]
        yield [hosts[id(module)] for module in modules]
    finally:
        for parent, name, child in places:
            parent._modules[name] = child
