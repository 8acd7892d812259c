"""Which variant a candidate computes, decided by running it.

The candidate and each hypothesis are compared on seeded inputs, among them large means and values right at the
threshold. A hypothesis is accepted when no gate differs beyond what rounding explains and the values agree to 1e-6
relative L2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from scconv_deploy.errors import ModelError, ScconvDeployError
from scconv_deploy.gate import variant as pytorch_gate
from scconv_deploy.gate.bound import FlipCount, count_flips
from scconv_deploy.gate.candidates import Candidate, ConvPlace
from scconv_deploy.gate.cut import GateParameters, gate_parameters, open_by_cut
from scconv_deploy.gate.outputs import compare_outputs, relative_l2
from scconv_deploy.gate.probes import probes
from scconv_deploy.gate.variant import VARIANTS, GateVariant, check_groups, check_halves

VALUE_TOLERANCE = 1e-6
"""Relative L2 between a module and its variant where no gate differs. torch itself sums in several orders, so a
bit-exact match is too much to ask; a wrong eps, ddof or data path is at least 1e-5 away."""

_COMMON_GROUPS = (16, 4, 8, 32, 2, 1)
_NEAREST = 16  # how many of the hypotheses nearest to the behaviour are put to the full test
_UNLIKE = 0.2  # relative L2 beyond which a candidate is called no SRU at all
_CLEAR = 1e-3
"""Share of gates, on inputs made to sit on the threshold, up to which a match is beyond doubt. Measured on 401,408
gates: Python's sum(gamma) for torch's flips 3.4e-4 of them, the biased deviation with beta = 0 flips 1.2e-2."""
_SMALL_BATCH, _SMALL_SIZE = 2, 8  # of the input on which hypotheses are ranked


@dataclass(frozen=True)
class Hypothesis:
    """What a candidate may compute: the variant, which parameter is gamma, and where its convolution stands."""

    variant: GateVariant
    swapped_affine: bool = False
    conv_place: ConvPlace = "none"


@dataclass(frozen=True, eq=False)
class Identified:
    """A hypothesis that passed the full test; ``flips`` is the largest share of gates that only rounding explains."""

    hypothesis: Hypothesis
    parameters: GateParameters
    flips: float


class NotIdentifiedError(Exception):
    """No hypothesis, or not this one; the message is the reason."""


def identify(candidate: Candidate, recorded: Tensor, seed: int, remembered: Hypothesis | None) -> Identified:
    """Find the hypothesis that passes the full test.

    Among several that pass, the one with the fewest differing gates: rounding hides small differences such as ddof
    where beta is 0, but seldom from every gate.

    Args:
        recorded: the candidate's input on the example, float32 ``[N, C, H, W]``.
        seed: of the probes.
        remembered: what another module of the same class turned out to be; tried first.

    Raises:
        NotIdentifiedError: with the reason.
    """
    try:
        check_halves(candidate.affine[0].numel(), "it")
    except ScconvDeployError as error:
        raise NotIdentifiedError(error.message) from error
    if not torch.isfinite(recorded).all():
        raise NotIdentifiedError("its input holds NaN or Inf on the example input")
    with torch.no_grad():
        if remembered is not None:
            found, _ = _best(candidate, [remembered], recorded, seed)
            if found is not None and found.flips <= _CLEAR:
                return found
        try:
            ranked = _rank(candidate, recorded, seed)
        except Exception as error:  # the user's own code: whatever it raises is the reason
            raise NotIdentifiedError(f"it cannot be probed: {type(error).__name__}: {error}") from error
        if not ranked:
            raise NotIdentifiedError("no known variant has its shapes")
        found, reason = _best(candidate, [hypothesis for _, hypothesis in ranked[:_NEAREST]], recorded, seed)
    if found is not None:
        return found
    distance = ranked[0][0]
    if distance > _UNLIKE:
        raise NotIdentifiedError(f"it is not an SRU: its output is {distance:.0%} away from the nearest variant")
    raise NotIdentifiedError(f"it behaves like no known variant; {reason}")


def _best(
    candidate: Candidate, hypotheses: list[Hypothesis], recorded: Tensor, seed: int
) -> tuple[Identified | None, str]:
    """The first hypothesis that is clear, else the one with the fewest; and why the first one failed."""
    best: Identified | None = None
    reason = ""
    for hypothesis in hypotheses:
        # ranking cannot tell the comparisons apart: they differ where the sigmoid is exactly the threshold
        for comparison in dict.fromkeys([hypothesis.variant.comparison, ">=", ">"]):
            attempt = replace(hypothesis, variant=replace(hypothesis.variant, comparison=comparison))
            try:
                found = _accept(candidate, attempt, recorded, seed)
            except Exception as error:  # of the user's own code, or shapes that the hypothesis cannot have
                reason = reason or f"nearest {attempt.variant}: {error}"
                continue
            if found.flips <= _CLEAR:
                return found, reason
            if best is None or found.flips < best.flips:
                best = found
    return best, reason


def affine(candidate: Candidate, hypothesis: Hypothesis) -> tuple[nn.Parameter, nn.Parameter]:
    """gamma and beta of a candidate, under a hypothesis."""
    first, second = candidate.affine
    return (second, first) if hypothesis.swapped_affine else (first, second)


def _numbers(module: nn.Module) -> list[float]:
    """Numbers among the attributes and buffers of a module and its children: G, eps and t, under any name."""
    found: list[float] = []
    for child in module.modules():
        found += [v for v in vars(child).values() if isinstance(v, (int, float)) and not isinstance(v, bool)]
        found = [v for v in found if math.isfinite(v)]
        found += [float(b) for b in child.buffers(recurse=False) if b.numel() == 1]
    return found


def _hypotheses(candidate: Candidate) -> Iterator[Hypothesis]:
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
        yield Hypothesis(variant, swapped, place)


def _rank(candidate: Candidate, recorded: Tensor, seed: int) -> list[tuple[float, Hypothesis]]:
    """Hypotheses by relative L2 distance on one small input, nearest first."""
    generator = torch.Generator().manual_seed(seed)
    shape = (_SMALL_BATCH, recorded.shape[1], *(min(s, _SMALL_SIZE) for s in recorded.shape[2:]))
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


def _expected(candidate: Candidate, hypothesis: Hypothesis, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the hypothesis computes for the module's input, and the gate's own input."""
    if candidate.conv is not None and hypothesis.conv_place == "before":
        x = candidate.conv(x)
    gamma, beta = affine(candidate, hypothesis)
    if x.shape[1] != gamma.numel():
        raise ModelError(f"{x.shape[1]} channels meet {gamma.numel()} parameters")
    check_groups(x.shape[1], hypothesis.variant.num_groups, x[0].numel())
    y = pytorch_gate.sru(x, gamma, beta, hypothesis.variant)
    if candidate.conv is not None and hypothesis.conv_place == "after":
        y = candidate.conv(y)
    return y, x


def _accept(candidate: Candidate, hypothesis: Hypothesis, recorded: Tensor, seed: int) -> Identified:
    """Run the full test; raises NotIdentifiedError with the first disagreement."""
    variant = hypothesis.variant
    gamma, beta = affine(candidate, hypothesis)
    parameters = gate_parameters(gamma, beta, variant)
    flips = 0.0
    for name, x in probes(recorded, gamma, beta, variant, seed, hypothesis.conv_place != "before"):
        expected, gate_input = _expected(candidate, hypothesis, x)
        try:
            y = candidate.module(x)
        except Exception as error:  # the user's own code: whatever it raises is the reason
            raise NotIdentifiedError(f"on {name} input it raises {type(error).__name__}: {error}") from error
        if not isinstance(y, Tensor):
            raise NotIdentifiedError(f"on {name} input it returns {type(y).__name__}, not a tensor")
        if y.shape != expected.shape or y.dtype != expected.dtype:
            raise NotIdentifiedError(f"on {name} input its output is {y.dtype}{list(y.shape)}")
        if hypothesis.conv_place == "after":
            # a convolution mixes the channels, so gates cannot be read from the output: ask for the same values
            count, distance = FlipCount(y.numel()), relative_l2(y, expected)
        else:
            count, distance = compare_outputs(y, expected, gate_input, gamma, beta, parameters, variant)
        if count.unexplained:
            raise NotIdentifiedError(
                f"{count.unexplained} of {count.gates} gates differ beyond rounding on {name} input"
            )
        if not distance <= VALUE_TOLERANCE:
            raise NotIdentifiedError(f"values differ by {distance:.1e} relative L2 on {name} input")
        by_formula = pytorch_gate.open_mask(gate_input, gamma, beta, variant)
        cut_flips = count_flips(
            by_formula != open_by_cut(gate_input, parameters, variant), gate_input, parameters, variant
        )
        if cut_flips.unexplained:
            raise NotIdentifiedError(f"the exact cut changes {cut_flips.unexplained} gates on {name} input")
        flips = max(flips, count.flips / count.gates)
    return Identified(hypothesis, parameters, flips)
