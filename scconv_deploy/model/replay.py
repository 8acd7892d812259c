"""PyTorch as the reference: gates recorded in float32, compared and injected; in float64 see :mod:`.float64`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scconv_deploy.gate.candidates import hookable
from scconv_deploy.gate.recognize import Recognition
from scconv_deploy.gate.swap import SwappedSRU, site_name
from scconv_deploy.model import steps
from scconv_deploy.model.signature import Signature


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite: a finite sum shows it, an overflowing one is checked entry by entry."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


@dataclass(frozen=True, eq=False)
class RecordedGate:
    """One call of an SRU: the gate's input and the reference's mask, ``[N, C, H, W]`` each, and its output."""

    swapped: SwappedSRU
    x: Tensor
    mask: Tensor
    y: Tensor


def record_gates(
    swapped: nn.Module, signature: Signature, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, RecordedGate]]:
    """Run the swapped model in float32 and record each call of an SRU.

    Returns:
        its outputs by name, and every gate by site.
    """
    modules = {m.path: m for m in swapped.modules() if isinstance(m, SwappedSRU)}
    pending: dict[str, tuple[Tensor, Tensor]] = {}
    recorded: dict[str, RecordedGate] = {}
    calls: Counter[str] = Counter()

    def on_gate(path: str, x: Tensor) -> Tensor:
        mask = modules[path].gate.mask(x)
        pending[path] = x.clone(), mask  # cloned: code in the wild writes into its tensors in place
        return mask

    def on_output(module: nn.Module, args: object, y: Tensor) -> None:
        assert isinstance(module, SwappedSRU)  # noqa: S101  (for the type checker: only these have the hook)
        calls[module.path] += 1
        recorded[site_name(module.path, calls[module.path])] = RecordedGate(
            module, *pending.pop(module.path), y.clone()
        )

    with _watched(swapped, on_gate), ExitStack() as stack:
        for module in modules.values():
            stack.callback(module.register_forward_hook(on_output).remove)
        return signature.call(swapped, tensors), recorded


def replay(
    swapped: nn.Module,
    signature: Signature,
    tensors: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    watch: Callable[[str, Tensor], None] = lambda site, x: None,
    free: Mapping[str, Callable[[steps.Operand], Tensor]] | None = None,
    own: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Tensor]:
    """Run the swapped model with given masks.

    Args:
        masks: by site, bool ``[N, C, H, W]``; of other gates see :func:`.steps.fixed`.
        watch: told every site and its gate's input, and the margins of other gates.
        free: what decides gates of no SRU that are not given, by name.
        own: the same of SRUs, from their gate's input, by site.

    Returns:
        its outputs by name.
    """
    calls: Counter[str] = Counter()

    def on_gate(path: str, x: Tensor) -> Tensor:
        calls[path] += 1
        site = site_name(path, calls[path])
        watch(site, x)
        return own[site](x) if own and site in own else masks[site]

    with _watched(swapped, on_gate), steps.fixed(swapped, tensors, masks, watch, free):
        return signature.call(swapped, tensors)


@dataclass(frozen=True)
class Disturbance:
    """Noise on the operands of gates of no SRU.

    Attributes:
        relative: size of the noise in units of the largest operand.
        others: names of the gates.
    """

    relative: float
    seed: int
    others: tuple[str, ...]

    @property
    def decisions(self) -> dict[str, Callable[[steps.Operand], Tensor]]:
        """Functions that decide the gates, by name."""
        generator = torch.Generator().manual_seed(self.seed)
        return dict.fromkeys(self.others, lambda one: steps.disturbed(one, one.scale * self.relative, generator))


def run_between(
    swapped: nn.Module,
    signature: Signature,
    tensors: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    disturbance: Disturbance | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run the swapped model with given tensors as the outputs of its SRUs.

    Args:
        outputs: by site, ``[N, C, H, W]``.
        disturbance: of gates of no SRU; None for none.

    Returns:
        the input of each SRU's gate by site, and the model's outputs by name.
    """
    calls: Counter[str] = Counter()
    inputs: dict[str, Tensor] = {}

    def on_output(path: str, x: Tensor) -> Tensor:
        calls[path] += 1
        site = site_name(path, calls[path])
        inputs[site] = x.clone()  # cloned: code in the wild writes into its tensors in place
        # made of x, so that what reads it depends on the inputs; cloned for the reason above
        return x.new_empty(outputs[site].shape).copy_(outputs[site])

    modules = [m for m in swapped.modules() if isinstance(m, SwappedSRU)]
    for module in modules:
        module.on_output = on_output
    try:
        free = None if disturbance is None else disturbance.decisions
        with torch.no_grad(), steps.fixed(swapped, tensors, {}, free=free):
            return inputs, signature.call(swapped, tensors)
    finally:
        for module in modules:
            module.on_output = None


def run_disturbed(
    swapped: nn.Module,
    signature: Signature,
    tensors: Mapping[str, Tensor],
    relative: float,
    seed: int,
    others: Collection[str] = (),
) -> dict[str, Tensor]:
    """Run the swapped model with noise on the inputs of its gates, and none on the data.

    Args:
        relative: size of the noise in units of the rms of the gate's input; of the largest operand of gates of no SRU.
        others: names of those.

    Returns:
        its outputs by name.
    """
    modules = {m.path: m for m in swapped.modules() if isinstance(m, SwappedSRU)}
    generator = torch.Generator().manual_seed(seed)

    def on_gate(path: str, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=generator) * (relative * x.square().mean().sqrt())
        return modules[path].gate.mask(x + noise)

    def decide(operand: steps.Operand) -> Tensor:
        return steps.disturbed(operand, operand.scale * relative, generator)

    free = dict.fromkeys(others, decide)
    with _watched(swapped, on_gate), torch.no_grad(), steps.fixed(swapped, tensors, {}, free=free):
        return signature.call(swapped, tensors)


def record_modules(model: nn.Module, paths: Sequence[str], run: Callable[[], object]) -> dict[tuple[str, int], Tensor]:
    """Outputs of modules while the model runs, by path and call (from 1); only those that return one tensor."""
    outputs: dict[tuple[str, int], Tensor] = {}
    calls: Counter[str] = Counter()
    modules = dict(model.named_modules())
    with ExitStack() as stack:
        for path in paths:
            if path not in modules:
                continue

            def keep(module: nn.Module, args: object, output: object, path: str = path) -> None:
                calls[path] += 1
                if isinstance(output, Tensor):
                    outputs[path, calls[path]] = output.detach().clone()

            stack.callback(modules[path].register_forward_hook(keep).remove)
        run()
    return outputs


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
    model: nn.Module,
    recognition: Recognition,
    signature: Signature,
    tensors: Mapping[str, Tensor],
    on_call: Callable[[str, int, Tensor, Tensor], None],
) -> dict[str, Tensor]:
    """Run the user's model untouched.

    Args:
        on_call: told the path, the call (from 1), the input and the output of every recognised module; the output is
            the module's own tensor, to be read at once.

    Returns:
        its outputs by name.
    """
    calls: Counter[str] = Counter()
    entered: dict[str, Tensor] = {}
    with ExitStack() as stack:
        hosts = stack.enter_context(hookable(model, [found.module for found in recognition.srus]))
        for found, host in zip(recognition.srus, hosts, strict=True):

            def before(module: nn.Module, args: tuple, kwargs: dict, path: str = found.path) -> None:
                value = args[0] if args else next(iter(kwargs.values()))
                entered[path] = value.clone()  # code in the wild writes into its tensors in place

            def after(module: nn.Module, args: tuple, kwargs: dict, output: Tensor, path: str = found.path) -> None:
                calls[path] += 1
                with torch.no_grad():
                    on_call(path, calls[path], entered.pop(path), output)

            stack.callback(host.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(host.register_forward_hook(after, with_kwargs=True).remove)
        return signature.call(model, tensors)
