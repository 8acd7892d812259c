"""PyTorch as the reference: gates recorded in float32, and replayed in float64 for the noise floor."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from scconv_deploy.gate import Recognition, SwappedSRU, site_name
from scconv_deploy.gate.variant import open_mask
from scconv_deploy.signature import Signature


@dataclass(frozen=True, eq=False)
class RecordedGate:
    """One call of an SRU: the gate's input and what the reference decided, ``[N, C, H, W]`` each."""

    swapped: SwappedSRU
    x: Tensor
    mask: Tensor


def record_gates(
    swapped: nn.Module, signature: Signature, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, RecordedGate]]:
    """Run the swapped model in float32.

    Returns:
        its outputs by name, and every gate by site.
    """
    modules = {m.path: m for m in swapped.modules() if isinstance(m, SwappedSRU)}
    recorded: dict[str, RecordedGate] = {}
    calls: Counter[str] = Counter()

    def on_gate(path: str, x: Tensor) -> Tensor:
        calls[path] += 1
        module = modules[path]
        mask = open_mask(x, module.gamma, module.beta, module.variant)
        recorded[site_name(path, calls[path])] = RecordedGate(module, x, mask)
        return mask

    with _watched(swapped, on_gate):
        return signature.call(swapped, tensors), recorded


def replay(
    swapped: nn.Module, signature: Signature, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Run the swapped model with given gates.

    Args:
        masks: by site, bool ``[N, C, H, W]``.

    Returns:
        its outputs by name.
    """
    calls: Counter[str] = Counter()

    def on_gate(path: str, x: Tensor) -> Tensor:
        calls[path] += 1
        return masks[site_name(path, calls[path])]

    with _watched(swapped, on_gate):
        return signature.call(swapped, tensors)


class Float64Replay:
    """The swapped model in float64, with the gates of the float32 run: a ruler for noise, no judge of gates."""

    def __init__(self, swapped: nn.Module, signature: Signature) -> None:
        self._model = copy.deepcopy(swapped).double()
        self._signature = signature

    def run(self, tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run with masks by site; outputs by name, in float64."""
        doubled = {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}
        return replay(self._model, self._signature, doubled, masks)


@contextmanager
def _watched(model: nn.Module, on_gate: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    modules = [m for m in model.modules() if isinstance(m, SwappedSRU)]
    for module in modules:
        module.on_gate = on_gate
    try:
        yield
    finally:
        for module in modules:
            module.on_gate = None


def run_as_given(
    model: nn.Module, recognition: Recognition, signature: Signature, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[tuple[Tensor, Tensor]]]]:
    """Run the user's model untouched.

    Returns:
        its outputs by name, and for each recognised module (by path) the (input, output) of every call.
    """
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {found.path: [] for found in recognition.srus}
    handles = []
    for found in recognition.srus:

        def keep(module: nn.Module, args: tuple, kwargs: dict, output: Tensor, path: str = found.path) -> None:
            value = args[0] if args else next(iter(kwargs.values()))
            # cloned: code in the wild writes into its tensors in place
            calls[path].append((value.clone(), output.clone()))

        handles.append(found.module.register_forward_hook(keep, with_kwargs=True))
    try:
        return signature.call(model, tensors), calls
    finally:
        for handle in handles:
            handle.remove()
