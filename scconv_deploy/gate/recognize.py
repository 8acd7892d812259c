"""Find SRUs in any model: candidates by structure, the variant by behaviour.

All code in the wild shares attribute names and differs in meaning, so a name proves nothing. A candidate is run on
seeded inputs, among them large means and values right at the threshold, and compared with each known variant. It is
accepted when no gate differs beyond what rounding explains and the values agree to 1e-6 relative L2; otherwise the
module stays as it is, with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scconv_deploy.errors import ScconvDeployError
from scconv_deploy.gate import variant as pytorch_gate
from scconv_deploy.gate.bound import FlipCount, count_flips, margins_and_bounds
from scconv_deploy.gate.cut import GateParameters, gate_parameters, open_by_cut, statistics
from scconv_deploy.gate.variant import VARIANTS, GateVariant, check_groups, check_halves

VALUE_TOLERANCE = 1e-6
"""Relative L2 between a module and its variant where no gate differs. torch itself sums in several orders, so a
bit-exact match is too much to ask; a wrong eps, ddof or data path is at least 1e-5 away."""

_PROBE_BATCH = 2
_COMMON_GROUPS = (16, 4, 8, 32, 2, 1)
_NEAREST = 16  # how many of the hypotheses nearest to the behaviour are put to the full test

ConvPlace = Literal["none", "before", "after"]


@dataclass(frozen=True, eq=False)
class RecognizedSRU:
    """One SRU of the model.

    Attributes:
        path: its name in the model; ``paths`` holds every name it is registered under.
        module: the module itself.
        variant: what it computes.
        gamma, beta: its parameters, C elements each.
        parameters: cut and sign.
        conv: a 1x1 convolution inside the module, and whether it comes before or after the gate.
    """

    path: str
    paths: tuple[str, ...]
    module: nn.Module
    variant: GateVariant
    gamma: nn.Parameter
    beta: nn.Parameter
    parameters: GateParameters
    conv: nn.Conv2d | None = None
    conv_place: ConvPlace = "none"


@dataclass(frozen=True)
class Refusal:
    """A candidate that was left as it is."""

    path: str
    reason: str


@dataclass(frozen=True, eq=False)
class Recognition:
    """What :func:`recognize` found, in the model's order."""

    srus: tuple[RecognizedSRU, ...] = ()
    refused: tuple[Refusal, ...] = ()


class SwappedSRU(nn.Module):
    """An SRU whose gate can be watched and injected; otherwise it computes what the module computed.

    Attributes:
        path: the site's name.
        on_gate: if set, called with the path and the gate's input; a mask that it returns is used instead of the
            computed one.
    """

    def __init__(self, found: RecognizedSRU) -> None:
        super().__init__()
        self.path = found.path
        self.variant = found.variant
        self.parameters_of_gate = found.parameters
        self.gamma = found.gamma
        self.beta = found.beta
        self.conv = found.conv
        self.conv_place = found.conv_place
        self.on_gate: Callable[[str, Tensor], Tensor | None] | None = None

    def gate(self, x: Tensor) -> Tensor:
        mask = self.on_gate(self.path, x) if self.on_gate is not None else None
        return pytorch_gate.sru(x, self.gamma, self.beta, self.variant, mask)

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None and self.conv_place == "before":
            return self.gate(self.conv(x))
        y = self.gate(x)
        return self.conv(y) if self.conv is not None and self.conv_place == "after" else y


@dataclass(frozen=True, eq=False)
class _Candidate:
    path: str
    module: nn.Module
    affine: tuple[nn.Parameter, nn.Parameter]
    conv: nn.Conv2d | None
    conv_places: tuple[ConvPlace, ...]


@dataclass(frozen=True)
class _Hypothesis:
    variant: GateVariant
    swapped_affine: bool = False
    conv_place: ConvPlace = "none"


def recognize(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], seed: int = 0) -> Recognition:
    """Find the SRUs of a model.

    Args:
        model: in eval mode, float32, on the CPU.
        args, kwargs: example inputs; the model is run on them once, to learn the shapes that reach each candidate.
        seed: of the probe inputs.
    """
    candidates = list(_candidates(model))
    inputs = _record_inputs(model, [c.module for c in candidates], args, kwargs)
    accepted: list[RecognizedSRU] = []
    refused: list[Refusal] = []
    remembered: dict[type, _Hypothesis] = {}
    done: set[str] = set()
    for candidate in candidates:
        if any(candidate.path.startswith(path + ".") for path in done):
            continue
        x = inputs.get(id(candidate.module), "it is never called on the example input")
        if isinstance(x, str):
            refused.append(Refusal(candidate.path, x))
            continue
        found = _identify(candidate, x, seed, remembered.get(type(candidate.module)))
        if isinstance(found, str):
            refused.append(Refusal(candidate.path, found))
            continue
        hypothesis, parameters = found
        remembered[type(candidate.module)] = hypothesis
        gamma, beta = _affine(candidate, hypothesis)
        paths = tuple(n for n, m in model.named_modules(remove_duplicate=False) if m is candidate.module)
        done.add(candidate.path)
        accepted.append(
            RecognizedSRU(
                candidate.path, paths, candidate.module, hypothesis.variant, gamma, beta, parameters,
                candidate.conv, hypothesis.conv_place,
            )
        )  # fmt: skip
    # What is inside a candidate was tried because the candidate itself was refused: one reason is enough.
    outer = [candidate.path for candidate in candidates]
    refused = [r for r in refused if not any(r.path.startswith(path + ".") for path in outer)]
    return Recognition(tuple(accepted), tuple(refused))


def swap(model: nn.Module, recognition: Recognition) -> nn.Module:
    """A copy of the model that shares its tensors, with each recognised SRU replaced by a :class:`SwappedSRU`."""
    return replace_modules(model, {id(found.module): SwappedSRU(found) for found in recognition.srus})


def replace_modules(model: nn.Module, replacements: dict[int, nn.Module]) -> nn.Module:
    """A copy of the model that shares its tensors, with modules replaced by identity wherever they are registered."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    # deepcopy takes what the memo holds for an object as its copy: this is the replacement, at every place at once
    memo.update(replacements)
    return copy.deepcopy(model, memo)


# --- structure ---------------------------------------------------------------------------------------------------


def _candidates(model: nn.Module) -> Iterator[_Candidate]:
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn"):
            continue
        convs: list[nn.Conv2d] = []
        others: list[nn.Parameter] = []
        for child in module.modules():
            own = list(child.parameters(recurse=False))
            if isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1) and child.groups == 1:
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
        yield _Candidate(path, module, (others[0], others[1]), convs[0] if convs else None, places)


def _is_per_channel(parameter: nn.Parameter) -> bool:
    return parameter.numel() >= 2 and max(parameter.shape) == parameter.numel()


def _record_inputs(
    model: nn.Module, modules: list[nn.Module], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[int, Tensor | str]:
    """The first input of each module, cut to two samples, or why it cannot be used."""
    inputs: dict[int, Tensor | str] = {}

    def record(module: nn.Module, called_with: tuple[Any, ...], called_by_name: dict[str, Any]) -> None:
        values = [*called_with, *called_by_name.values()]
        if len(values) != 1 or not isinstance(values[0], Tensor) or values[0].dim() != 4:
            inputs.setdefault(id(module), "it is not called with one tensor [N, C, H, W]")
        elif values[0].dtype != torch.float32:
            inputs.setdefault(id(module), f"its input is {values[0].dtype}, not float32")
        else:
            inputs.setdefault(id(module), values[0][:_PROBE_BATCH].detach().clone())

    handles = [m.register_forward_pre_hook(record, with_kwargs=True) for m in modules]
    try:
        if modules:
            with torch.no_grad():
                model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return inputs


# --- behaviour ---------------------------------------------------------------------------------------------------


def _affine(candidate: _Candidate, hypothesis: _Hypothesis) -> tuple[nn.Parameter, nn.Parameter]:
    first, second = candidate.affine
    return (second, first) if hypothesis.swapped_affine else (first, second)


def _numbers(module: nn.Module) -> list[float]:
    """Plain numbers among the attributes of a module and its children: they hold G, eps and t under any name."""
    return [
        value
        for child in module.modules()
        for value in vars(child).values()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _hypotheses(candidate: _Candidate) -> Iterator[_Hypothesis]:
    numbers = _numbers(candidate.module)
    channels = candidate.affine[0].numel()
    groups = dict.fromkeys(int(v) for v in (*numbers, *_COMMON_GROUPS) if v == int(v) and 1 <= v <= channels)
    thresholds = dict.fromkeys(float(v) for v in (*numbers, 0.5) if 0.01 < v < 1)
    small = dict.fromkeys(float(v) for v in numbers if 0 < v <= 0.01)
    norms = [m for m in candidate.module.modules() if isinstance(m, nn.GroupNorm)]
    normalizations: list[tuple[Any, int, float]] = [("group_norm", m.num_groups, m.eps) for m in norms]
    normalizations += list(product(["group_batchnorm"], groups, dict.fromkeys([*small, 1e-10])))
    if not norms:
        normalizations += list(product(["group_norm"], groups, dict.fromkeys([*small, 1e-5])))
    for (kind, num_groups, eps), threshold, base, weighting, place, swapped in product(
        normalizations, thresholds, VARIANTS.values(), ("sum", "softmax"), candidate.conv_places, (False, True)
    ):
        if kind == "group_norm" and channels % num_groups:
            continue
        variant = replace(
            base, statistics=kind, num_groups=num_groups, eps=eps, threshold=threshold, weighting=weighting
        )
        yield _Hypothesis(variant, swapped, place)


class _NotThisOne(Exception):
    """A hypothesis failed; the message says on which probe and by how much."""


def _identify(
    candidate: _Candidate, recorded: Tensor, seed: int, remembered: _Hypothesis | None
) -> tuple[_Hypothesis, GateParameters] | str:
    """The hypothesis that passes the full test with its parameters, or the reason why none does."""
    try:
        check_halves(candidate.affine[0].numel(), "it")
    except ScconvDeployError as error:
        return error.message
    if not torch.isfinite(recorded).all():
        return "its input holds NaN or Inf on the example input"
    with torch.no_grad():
        if remembered is not None:
            try:
                return _accept_either_comparison(candidate, remembered, recorded, seed)
            except (_NotThisOne, ScconvDeployError):
                pass
        try:
            ranked = _rank(candidate, recorded, seed)
        except Exception as error:  # the user's own code: whatever it raises is the reason
            return f"it cannot be probed: {type(error).__name__}: {error}"
        if not ranked:
            return "no known variant has its shapes"
        distance, nearest = ranked[0]
        reason = ""
        for _, hypothesis in ranked[:_NEAREST]:
            try:
                return _accept_either_comparison(candidate, hypothesis, recorded, seed)
            except (_NotThisOne, ScconvDeployError) as error:
                reason = reason or str(error)
        if distance > 0.2:
            return f"it is not an SRU: its output is {distance:.0%} away from the nearest variant"
        return f"it behaves like no known variant; nearest {nearest.variant}: {reason}"


def _rank(candidate: _Candidate, recorded: Tensor, seed: int) -> list[tuple[float, _Hypothesis]]:
    """Hypotheses by relative L2 distance on one small input, nearest first."""
    generator = torch.Generator().manual_seed(seed)
    shape = (_PROBE_BATCH, recorded.shape[1], *(min(s, 8) for s in recorded.shape[2:]))
    x = torch.randn(shape, generator=generator)
    try:
        y = candidate.module(x)
    except Exception:  # a module that takes only its own size is probed at it
        x = torch.randn(recorded.shape, generator=generator)
        y = candidate.module(x)
    ranked = []
    for hypothesis in _hypotheses(candidate):
        try:
            expected, _ = _expected(candidate, hypothesis, x)
        except (ScconvDeployError, RuntimeError):
            continue  # shapes that this hypothesis cannot have
        if expected.shape == y.shape:
            distance = float((y - expected).norm() / y.norm().clamp_min(1e-30))
            ranked.append((distance if distance == distance else float("inf"), hypothesis))
    return sorted(ranked, key=lambda pair: pair[0])


def _expected(candidate: _Candidate, hypothesis: _Hypothesis, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the hypothesis computes for the module's input, and the gate's own input."""
    if candidate.conv is not None and hypothesis.conv_place == "before":
        x = candidate.conv(x)
    gamma, beta = _affine(candidate, hypothesis)
    if x.shape[1] != gamma.numel():
        raise _shape_error(x, gamma)
    check_groups(x.shape[1], hypothesis.variant.num_groups, x[0].numel())
    y = pytorch_gate.sru(x, gamma, beta, hypothesis.variant)
    if candidate.conv is not None and hypothesis.conv_place == "after":
        y = candidate.conv(y)
    return y, x


def _shape_error(x: Tensor, gamma: Tensor) -> ScconvDeployError:
    return ScconvDeployError(f"{x.shape[1]} channels meet {gamma.numel()} parameters")


def _accept_either_comparison(
    candidate: _Candidate, hypothesis: _Hypothesis, recorded: Tensor, seed: int
) -> tuple[_Hypothesis, GateParameters]:
    first: _NotThisOne | None = None
    for comparison in dict.fromkeys([hypothesis.variant.comparison, ">=", ">"]):
        attempt = replace(hypothesis, variant=replace(hypothesis.variant, comparison=comparison))
        try:
            return attempt, _accept(candidate, attempt, recorded, seed)
        except _NotThisOne as error:
            first = first or error
    assert first is not None  # noqa: S101  (for the type checker: the loop runs at least twice)
    raise first


def _accept(candidate: _Candidate, hypothesis: _Hypothesis, recorded: Tensor, seed: int) -> GateParameters:
    """Run the full test; raises _NotThisOne with the first disagreement."""
    variant = hypothesis.variant
    gamma, beta = _affine(candidate, hypothesis)
    parameters = gate_parameters(gamma, beta, variant)
    for name, x in _probes(recorded, gamma, beta, hypothesis, seed):
        expected, gate_input = _expected(candidate, hypothesis, x)
        try:
            y = candidate.module(x)
        except Exception as error:  # the user's own code: whatever it raises is the reason
            raise _NotThisOne(f"on {name} input it raises {type(error).__name__}: {error}") from error
        if y.shape != expected.shape or y.dtype != expected.dtype:
            raise _NotThisOne(f"on {name} input its output is {y.dtype}{list(y.shape)}")
        if hypothesis.conv_place == "after":
            # a convolution mixes the channels, so gates cannot be read from the output: ask for the same values
            count, distance = FlipCount(y.numel()), relative_l2(y, expected)
        else:
            count, distance = compare_outputs(y, expected, gate_input, gamma, beta, parameters, variant)
        if count.unexplained:
            raise _NotThisOne(f"{count.unexplained} of {count.gates} gates differ beyond rounding on {name} input")
        if not distance <= VALUE_TOLERANCE:
            raise _NotThisOne(f"values differ by {distance:.1e} relative L2 on {name} input")
        by_formula = pytorch_gate.open_mask(gate_input, gamma, beta, variant)
        cut_flips = count_flips(
            by_formula != open_by_cut(gate_input, parameters, variant), gate_input, parameters, variant
        )
        if cut_flips.unexplained:
            raise _NotThisOne(f"the exact cut changes {cut_flips.unexplained} gates on {name} input")
    return parameters


def relative_l2(y: Tensor, expected: Tensor) -> float:
    """``|y - expected| / |expected|``, accumulated in float64."""
    return float((y.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def compare_outputs(
    y: Tensor,
    expected: Tensor,
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    parameters: GateParameters,
    variant: GateVariant,
) -> tuple[FlipCount, float]:
    """Flips between two SRUs fed the same x, read from their outputs, and how far the other elements are apart.

    A gate that changes moves its outputs by at least 0.4 of the data it lets through, rounding by 1e-6 of it.

    Args:
        y, expected, x: ``[N, C, H, W]``, the outputs and the gate's input.

    Returns:
        the flips, and the relative L2 distance of the elements without one.
    """
    if torch.equal(y, expected):
        return FlipCount(y.numel()), 0.0
    data = (x if variant.data == "x" else pytorch_gate.normalize(x, gamma, beta, variant)).abs()
    half = x.shape[1] // 2
    size = data[:, :half] + data[:, half:]
    size = torch.cat([size, size], 1)
    floor = 1e-6 * data.square().mean().sqrt()
    changed = ~((y - expected).abs() <= 1e-4 * size + floor)
    pair = changed[:, :half] | changed[:, half:]
    margin, bound, _ = margins_and_bounds(x, parameters, variant)
    sureness = margin.abs() / bound
    lower_is_nearer = sureness[:, :half] <= sureness[:, half:]
    differs = torch.cat([pair & lower_is_nearer, pair & ~lower_is_nearer], 1)
    same = ~torch.cat([pair, pair], 1)
    return count_flips(differs, x, parameters, variant), relative_l2(y[same], expected[same])


def _probes(
    recorded: Tensor, gamma: Tensor, beta: Tensor, hypothesis: _Hypothesis, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Seeded inputs that tell variants apart, in the module's own input shape."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(recorded.shape, generator=generator)
    if hypothesis.conv_place == "before":
        # the gate's input cannot be chosen through a convolution; noise at several scales has to do
        yield from (("normal", base), ("small", base * 1e-3), ("large-mean", base + 100), ("recorded", recorded))
        return
    yield "normal", base
    # first without, then with an eps that matters beside the deviation
    for name, scale in (("near-threshold", 1.0), ("small near-threshold", 1e-3), ("tiny near-threshold", 1e-6)):
        yield name, _near_threshold(base * scale, gamma, beta, hypothesis.variant, generator)
    yield "large-mean", base + 100
    yield "rectified", base.relu()
    yield "recorded", recorded


def _near_threshold(
    base: Tensor, gamma: Tensor, beta: Tensor, variant: GateVariant, generator: torch.Generator
) -> Tensor:
    """Noise, half of which is moved to the gate's boundary.

    Of the moved elements, half lie around the boundary at relative distances from 1e-6 to 0.1 (they tell ddof and
    eps apart) and half between the boundaries of ``>=`` and ``>`` (they tell these apart).
    """
    inclusive = gate_parameters(gamma, beta, replace(variant, comparison=">="))
    strict = gate_parameters(gamma, beta, replace(variant, comparison=">"))

    def boundary(parameters: GateParameters) -> Tensor:
        return torch.as_tensor(parameters.sign * parameters.cut).double().reshape(1, -1, 1, 1)

    near, far = boundary(inclusive), boundary(strict)
    reachable = (near.abs() < 3) & (far.abs() < 3)  # NaN (sign 0) is not
    moved = (torch.rand(base.shape, generator=generator) < 0.5) & reachable
    between = torch.rand(base.shape, generator=generator) < 0.5
    along = torch.rand(base.shape, generator=generator, dtype=torch.float64)
    distance = 10 ** (-1 - 5 * along) * torch.where(torch.rand(base.shape, generator=generator) < 0.5, -1.0, 1.0)
    target = torch.where(between, near + along * (far - near), near * (1 + distance))
    x = base.clone()
    for _ in range(4):  # moving elements moves mean and s; this converges, for the other half stays
        mean, s = statistics(x.double(), variant)
        groups = x.double().reshape(x.shape[0], variant.num_groups, -1)
        mean = mean.expand_as(groups).reshape(x.shape)
        s = s.expand_as(groups).reshape(x.shape)
        x = torch.where(moved, mean + s * target, x.double()).float()
    return x
