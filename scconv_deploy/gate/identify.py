"""Identify the variant of a candidate by running it.

The candidate and each hypothesis are compared on seeded inputs, among them large means and values right at the
threshold. A hypothesis is accepted when no gate differs beyond what rounding explains and the values agree to 1e-6
relative L2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from scconv_deploy.errors import ScconvDeployError
from scconv_deploy.gate.candidates import Candidate, ConvPlace
from scconv_deploy.gate.cut import open_by_cut, tau
from scconv_deploy.gate.flips import compare_outputs, relative_l2
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.hypotheses import Hypothesis, crowd, expected_output, gate_of, other_shape, published, rank
from scconv_deploy.gate.probes import few_probes, probes
from scconv_deploy.gate.trial_run import (
    DoesNotRunError,
    NotIdentifiedError,
    require_near,
    run,
    run_gate,
    unchanged_buffers,
)
from scconv_deploy.gate.variant import Weighting, check_halves, compare, from_normalized, gate_weight, reweight

_NEAREST = 16  # how many of the hypotheses nearest to the behaviour are put to the full test
_UNLIKE = 0.2  # relative L2 beyond which a candidate is called no SRU at all
_CLEAR = 1e-3
"""Share of flips, on inputs made to sit on the threshold, up to which a match is certain. Measured on 401,408 gates:
Python's sum(gamma) in place of torch's flips 3.4e-4 of them, the biased deviation with beta = 0 flips 1.2e-2."""
_TIED = 1e-6  # in distance: as far as rounding moves the values of the right hypothesis
_MOST_TIED = 64
_HOPELESS = 0.05
"""In distance: on noise the right hypothesis differs in a gate of a million, which moves the output by a thousandth."""
_LARGEST_FULL = 2**15
"""Most gates of a sample for the full test at the module's own height and width. No probe's values depend on the size,
so a larger module gets all of them at a small size; at its own it must still be the same gate on its threshold."""


@dataclass(frozen=True, eq=False)
class Identified:
    """A hypothesis that passed the full test; ``flips`` is the largest share of flips on one probe, all explained."""

    hypothesis: Hypothesis
    gate: Gate
    flips: float


def identify(candidate: Candidate, recorded: Tensor, seed: int, remembered: Hypothesis | None) -> Identified:
    """Find the hypothesis that passes the full test.

    Of several that pass, the one with the fewest flips is taken: rounding hides small differences such as ddof where
    beta is 0, but seldom in every gate.

    Args:
        recorded: the candidate's input on the example, float32 ``[N, C, *]``.
        seed: of the probes.
        remembered: the hypothesis of another module of the same class; tried first.

    Raises:
        NotIdentifiedError: with the reason.
    """
    try:
        check_halves(candidate.affine[0].numel(), "it")
    except ScconvDeployError as error:
        raise NotIdentifiedError(error.message) from error
    if wrong := not_finite(candidate.module):
        raise NotIdentifiedError(f"its {wrong[0]}, so no gate is defined: check the checkpoint")
    if not torch.isfinite(recorded).all():
        raise NotIdentifiedError("its input holds NaN or Inf on the example input")
    with torch.no_grad(), unchanged_buffers(candidate.module):
        if remembered is not None:
            found, _ = _best(candidate, [(0.0, remembered)], recorded, seed)
            if found is not None and found.flips <= _CLEAR:
                return found
        elif (published := _published(candidate, recorded, seed)) is not None:
            return published
        ranked = rank(candidate, recorded, seed)
        if not ranked:
            raise NotIdentifiedError("no known variant has its shapes")
        tied = sum(distance <= ranked[0][0] + _TIED for distance, _ in ranked[:_MOST_TIED])
        found, reason = _best(candidate, ranked[: max(_NEAREST, tied)], recorded, seed)
    if found is not None:
        return found
    distance = ranked[0][0]
    if distance > _UNLIKE:
        raise NotIdentifiedError(f"it is not an SRU: its output is {distance:.0%} away from the nearest variant")
    raise NotIdentifiedError(f"it behaves like no known variant; {reason}")


def not_finite(module: nn.Module) -> list[str]:
    """The parameters of a module that hold NaN or Inf, and how many of their values."""
    found = []
    for name, parameter in module.named_parameters():
        for what, holds in (("NaN", torch.isnan(parameter)), ("Inf", torch.isinf(parameter))):
            if count := int(holds.sum()):
                found.append(f"{name} holds {what} ({count} of {parameter.numel()} values)")
    return found


def _published(candidate: Candidate, recorded: Tensor, seed: int) -> Identified | None:
    """A published variant that passes the full test without a single flip, so that nothing can be nearer; or None."""
    for hypothesis in published(candidate):
        for attempt in _in_orders(candidate, hypothesis):
            try:
                found = _accept(candidate, attempt, recorded, seed)
            except Exception:
                continue
            if not found.flips:
                return found
    return None


def _best(
    candidate: Candidate, ranked: list[tuple[float, Hypothesis]], recorded: Tensor, seed: int
) -> tuple[Identified | None, str]:
    """The passing hypothesis with the fewest flips, and why the first one failed.

    A share of flips up to ``_CLEAR`` ends the search after all hypotheses that are equally near. Of those that noise
    alone refutes, only the nearest is tried, for the reason.
    """
    best: Identified | None = None
    reason, until = "", math.inf
    for distance, hypothesis in ranked:
        if distance > until or (reason and distance > _HOPELESS):
            break
        for attempt in _alike(candidate, hypothesis):
            try:
                found = _accept(candidate, attempt, recorded, seed)
            except Exception as error:  # of the user's own code, or shapes that the hypothesis cannot have
                why = error.message if isinstance(error, ScconvDeployError) else error
                reason = reason or f"nearest {attempt.variant}: {why}"
                continue
            if not found.flips:
                return found, reason
            if best is None or found.flips < best.flips:
                best = found
            if found.flips <= _CLEAR:
                until = min(until, distance + _TIED)
    return best, reason


def _alike(candidate: Candidate, hypothesis: Hypothesis) -> Iterator[Hypothesis]:
    """The hypothesis and those that ranking cannot tell from it: comparisons differ only where the sigmoid is exactly
    the threshold, orders of the sum only by rounding."""
    for comparison in dict.fromkeys([hypothesis.variant.comparison, ">=", ">"]):
        yield from _in_orders(
            candidate, replace(hypothesis, variant=replace(hypothesis.variant, comparison=comparison))
        )


def _in_orders(candidate: Candidate, hypothesis: Hypothesis) -> Iterator[Hypothesis]:
    """The hypothesis in each order of the sum of gamma; orders that agree to the bit count as Python's."""
    orders: tuple[Weighting, ...] = (hypothesis.variant.weighting,)
    if orders[0] in ("sum", "torch_sum"):
        gamma = candidate.affine[hypothesis.swapped_affine]
        same = torch.equal(gate_weight(gamma, "sum"), gate_weight(gamma, "torch_sum"))
        orders = ("sum",) if same else ("sum", "torch_sum")
    for weighting in orders:
        yield replace(hypothesis, variant=replace(hypothesis.variant, weighting=weighting))


@dataclass(frozen=True)
class _Trial:
    """A shape of the gate's input, and whether all probes are tried there."""

    shape: tuple[int, ...]
    full: bool


def _trials(own: tuple[int, ...], num_groups: int) -> Iterator[_Trial]:
    """The shapes that a hypothesis is tried on: one with every probe, its own, and one of another size.

    A module may take only its own size, or batch: the caller goes on to the next full trial, down to its own shape.
    """
    other = other_shape(own, num_groups)
    others = [] if other is None else [other]
    if math.prod(own[1:]) > _LARGEST_FULL:
        yield from (_Trial(crowd(other), True) for other in others)
        yield _Trial(own, False)
        yield _Trial(own, True)
        return
    yield _Trial(crowd(own), True)
    if crowd(own) != own:
        yield _Trial(own, False)
        yield _Trial(own, True)
    yield from (_Trial(other, False) for other in others)


def _accept(candidate: Candidate, hypothesis: Hypothesis, recorded: Tensor, seed: int) -> Identified:
    """Run the full test; raises NotIdentifiedError with the first disagreement."""
    gate = gate_of(candidate, hypothesis)
    _, of_gate = expected_output(candidate, hypothesis, recorded)
    flips, decided, complete = 0.0, not _can_decide(gate, of_gate), False
    own = tuple(of_gate.shape)
    for trial in _trials(own, hypothesis.variant.num_groups):
        if trial.full and complete:
            continue
        shape = trial.shape
        given = of_gate if shape == own else _noise(shape, seed)
        fed = recorded if shape == own else _noise((shape[0], recorded.shape[1], *shape[2:]), seed)
        inputs = probes(given, gate, seed) if trial.full else few_probes(given, gate, seed)
        try:
            share, found = _compare(candidate, gate, hypothesis.conv_place, inputs, fed)
        except DoesNotRunError:
            if shape == own:
                raise
            continue  # it takes only its own size, or its own batch
        flips, decided, complete = max(flips, share), decided or found, complete or trial.full
    if hypothesis.conv_place == "before":  # the probes bypassed the convolution
        expected, _ = expected_output(candidate, hypothesis, recorded)
        require_near(relative_l2(run(candidate, "recorded", recorded), expected), "with its convolution")
    if not decided:
        raise NotIdentifiedError("no input was found on which >= and > differ, so its comparison is not known")
    return Identified(hypothesis, gate, flips)


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


def _compare(
    candidate: Candidate, gate: Gate, place: ConvPlace, inputs: Iterator[tuple[str, Tensor]], fed: Tensor
) -> tuple[float, bool]:
    """Compare the module with a hypothesis on probes of one shape.

    Args:
        inputs: inputs of the gate, with their names.
        fed: the module's own input of that shape.

    Returns:
        the largest share of explained flips, and whether a sigmoid was exactly the threshold.
    """
    flips, decided = 0.0, False
    for probe, x in inputs:
        name = f"{probe} input {'x'.join(map(str, x.shape))}"
        normalized = gate.normalize(x)
        r = reweight(normalized, gate.weight)
        mask = compare(r, gate.variant)
        expected = from_normalized(x, normalized, gate.weight, gate.variant, mask)
        y = run_gate(candidate, place, name, x, fed)
        if y.shape != expected.shape or y.dtype != expected.dtype:
            raise DoesNotRunError(f"on {name} its output is {y.dtype}{list(y.shape)}")
        count, distance = compare_outputs(y, expected, x, gate)
        if count.unexplained:
            raise NotIdentifiedError(f"{count.unexplained} of {count.gates} gates differ beyond rounding on {name}")
        require_near(distance, f"on {name}")
        decided = decided or bool((r == gate.variant.threshold).any())
        cut_flips = gate.count_flips(mask != open_by_cut(x, gate.form), x)
        if cut_flips.unexplained:
            raise NotIdentifiedError(f"the exact cut changes {cut_flips.unexplained} gates on {name}")
        flips = max(flips, count.flips / count.gates)
    return flips, decided


def _can_decide(gate: Gate, x: Tensor) -> bool:
    """Whether any input can tell >= from >: the sigmoid skips some float32 thresholds, and no element of L lies further
    than sqrt(L - 1) deviations out."""
    threshold = gate.variant.threshold
    elements = x[0].numel() / gate.variant.num_groups
    with np.errstate(invalid="ignore"):
        within = bool((np.abs(gate.form.cut) < math.sqrt(elements - 1)).any())
    return within and tau(threshold, ">=") != tau(threshold, ">")
