"""Identify the variant of a candidate by running it.

The candidate and each hypothesis are compared on seeded inputs, among them large means and values right at the
threshold. A hypothesis is accepted when no gate differs beyond what rounding explains and the values agree to 1e-6
relative L2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scconv_deploy.errors import ScconvDeployError
from scconv_deploy.gate.candidates import Candidate, ConvPlace
from scconv_deploy.gate.cut import open_by_cut, tau
from scconv_deploy.gate.flips import compare_outputs, relative_l2
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.probes import probes
from scconv_deploy.gate.variant import (
    VARIANTS,
    GateVariant,
    Statistics,
    Weighting,
    check_groups,
    check_halves,
    compare,
    from_normalized,
    gate_weight,
)
from scconv_deploy.records.gates import VALUE_TOLERANCE

_COMMON_GROUPS = (16, 4, 8, 32, 2, 1)
_COMMON_EPS = (1e-10, 1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-7, 1e-4, 1e-9)
_COMBINATIONS: tuple[Statistics, ...] = (
    "group_batchnorm",
    "biased_variance",
    "group_norm",
    "unbiased_variance",
    "biased_deviation",
)
_NEAREST = 16  # how many of the hypotheses nearest to the behaviour are put to the full test
_UNLIKE = 0.2  # relative L2 beyond which a candidate is called no SRU at all
_CLEAR = 1e-3
"""Share of flips, on inputs made to sit on the threshold, up to which a match is certain. Measured on 401,408 gates:
Python's sum(gamma) in place of torch's flips 3.4e-4 of them, the biased deviation with beta = 0 flips 1.2e-2."""
_OTHER_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    0: (),
    1: ((64,), (72,)),
    2: ((8, 8), (12, 6)),
    3: ((4, 4, 4), (6, 4, 3)),
    4: ((4, 4, 2, 2), (6, 3, 2, 2)),
    5: ((4, 2, 2, 2, 2), (3, 3, 2, 2, 2)),
    6: ((2, 2, 2, 2, 2, 2), (3, 3, 2, 2, 2, 1)),
}
"""Probe sizes by the number of axes behind the channels. Hypotheses are ranked at the first; the module is tested at
one that is not its own. Vectors ``[N, C]`` have none."""
_ENOUGH_GATES = 2**14
"""Fewest gates of a probe at the module's own height and width; the batch is enlarged to reach it. Differences that
rounding explains show in one of a hundred or a thousand gates on the threshold."""
_TIED = 1e-6  # in distance: as far as rounding moves the values of the right hypothesis
_MOST_TIED = 64
_EPS_SCALES = (1e-3, 1e-6, 1e-10)  # of inputs on which an eps shows: in the variance, in the deviation
_CANCELLED = 1e-4  # how far two orders of a sum are apart, relatively, before noise tells them apart


@dataclass(frozen=True)
class Hypothesis:
    """Hypothesis on a candidate: its variant, which parameter is gamma, and where its convolution stands."""

    variant: GateVariant
    swapped_affine: bool = False
    conv_place: ConvPlace = "none"


@dataclass(frozen=True, eq=False)
class Identified:
    """A hypothesis that passed the full test; ``flips`` is the largest share of flips on one probe, all explained."""

    hypothesis: Hypothesis
    gate: Gate
    flips: float


class NotIdentifiedError(Exception):
    """Why no hypothesis, or not the tested one, explains a module: a reason for the report, not a user's error."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class DoesNotRunError(NotIdentifiedError):
    """The module cannot run on a probe."""


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
    with torch.no_grad(), _unchanged_buffers(candidate.module):
        if remembered is not None:
            found, _ = _best(candidate, [(0.0, remembered)], recorded, seed)
            if found is not None and found.flips <= _CLEAR:
                return found
        ranked = _rank(candidate, recorded, seed)
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


def _best(
    candidate: Candidate, ranked: list[tuple[float, Hypothesis]], recorded: Tensor, seed: int
) -> tuple[Identified | None, str]:
    """The passing hypothesis with the fewest flips, and why the first one failed.

    A share of flips up to ``_CLEAR`` ends the search after all hypotheses that are equally near.
    """
    best: Identified | None = None
    reason, until = "", math.inf
    for distance, hypothesis in ranked:
        if distance > until:
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
    the threshold, orders of the sum only by rounding. Orders that agree to the bit count as Python's."""
    gamma = candidate.affine[hypothesis.swapped_affine]
    orders: list[Weighting] = [hypothesis.variant.weighting]
    if orders[0] in ("sum", "torch_sum"):
        orders = ["sum", "torch_sum"]
        if torch.equal(gate_weight(gamma, "sum"), gate_weight(gamma, "torch_sum")):
            orders = ["sum"]
    comparisons = dict.fromkeys([hypothesis.variant.comparison, ">=", ">"])
    for comparison, weighting in product(comparisons, orders):
        yield replace(hypothesis, variant=replace(hypothesis.variant, comparison=comparison, weighting=weighting))


def _gate(candidate: Candidate, hypothesis: Hypothesis) -> Gate:
    """The gate of a candidate, under a hypothesis."""
    first, second = candidate.affine
    return Gate(hypothesis.variant, *((second, first) if hypothesis.swapped_affine else (first, second)))


def _numbers(module: nn.Module) -> list[float]:
    """Numbers among the attributes and buffers of a module and its children: G, eps and t, under any name."""
    found: list[float] = []
    for child in module.modules():
        values = [*vars(child).values(), *child.buffers(recurse=False)]
        found += [float(v) for v in values if isinstance(v, (int, float, np.number)) and not isinstance(v, bool)]
        found += [float(v) for v in values if isinstance(v, Tensor) and v.numel() == 1 and not v.is_complex()]
    return [v for v in found if math.isfinite(v)]


def small_numbers(module: nn.Module) -> frozenset[float]:
    """Numbers between 0 and 1 in a module, such as eps and threshold; modules of one class may differ in them."""
    return frozenset(v for v in _numbers(module) if 0 < v < 1)


def _hypotheses(candidate: Candidate) -> Iterator[Hypothesis]:
    """All hypotheses on a candidate, with one eps each; :func:`_with_every_eps` adds the others."""
    numbers = _numbers(candidate.module)
    channels = candidate.affine[0].numel()
    divisors = [g for g in range(1, channels + 1) if channels % g == 0]
    groups = dict.fromkeys(int(v) for v in (*numbers, *_COMMON_GROUPS, *divisors) if v == int(v) and 1 <= v <= channels)
    thresholds = dict.fromkeys(float(v) for v in (*numbers, 0.5) if 0.01 < v < 1)
    norms = [m for m in candidate.module.modules() if isinstance(m, nn.GroupNorm)]
    weightings: dict[bool, list[Weighting]] = {}
    for swapped in (False, True):
        apart = _cancelled(candidate.affine[swapped])
        weightings[swapped] = ["sum", "torch_sum", "softmax"] if apart else ["sum", "softmax"]
    normalizations: list[tuple[Any, int, float]] = [("group_norm", m.num_groups, m.eps) for m in norms]
    if not norms:
        normalizations = list(product(_COMBINATIONS, groups, _COMMON_EPS[:1]))
    for (kind, num_groups, eps), threshold, base, place, swapped in product(
        normalizations, thresholds, VARIANTS.values(), candidate.conv_places, (False, True)
    ):
        if norms and channels % num_groups:
            continue
        for weighting in weightings[swapped]:
            variant = replace(
                base, statistics=kind, num_groups=num_groups, eps=eps, threshold=threshold, weighting=weighting
            )
            yield Hypothesis(variant, swapped, place)


def _cancelled(gamma: Tensor) -> bool:
    """Whether sum(gamma) cancels so much that noise tells its two orders apart."""
    ours, theirs = gate_weight(gamma, "sum"), gate_weight(gamma, "torch_sum")
    return not bool(((ours - theirs).abs() <= _CANCELLED * ours.abs()).all())


def _with_every_eps(candidate: Candidate, hypothesis: Hypothesis) -> Iterator[Hypothesis]:
    if any(isinstance(m, nn.GroupNorm) for m in candidate.module.modules()):
        yield hypothesis
        return
    for eps in dict.fromkeys([*(v for v in _numbers(candidate.module) if 0 < v <= 0.1), *_COMMON_EPS]):
        yield replace(hypothesis, variant=replace(hypothesis.variant, eps=float(eps)))


def _rank(candidate: Candidate, recorded: Tensor, seed: int) -> list[tuple[float, Hypothesis]]:
    """Hypotheses by relative L2 distance on one small input, nearest first; then, with every eps, on tiny ones."""
    generator = torch.Generator().manual_seed(seed)
    own = tuple(recorded.shape)
    small = [(2, own[1], *size) for size in _OTHER_SIZES[len(own) - 2][:1]]
    for shape in (*small, _crowd(own), own):  # a module may take only its own size, or batch
        x = torch.randn(shape, generator=generator)
        try:
            y = _run(candidate, "normal", x)
            break
        except DoesNotRunError:
            if shape == own:
                raise
    coarse = _by_distance(candidate, _hypotheses(candidate), x, y)
    tiny = [(x * scale, _run(candidate, "tiny", x * scale)) for scale in _EPS_SCALES]
    fine = [h for _, near in coarse[:_NEAREST] for h in _with_every_eps(candidate, near)]
    distances: dict[Hypothesis, float] = dict.fromkeys(fine, 0.0)
    for small_x, small_y in ((x, y), *tiny):
        for distance, hypothesis in _by_distance(candidate, fine, small_x, small_y):
            distances[hypothesis] += distance
    return sorted(((d, h) for h, d in distances.items()), key=lambda pair: pair[0])


def _by_distance(
    candidate: Candidate, hypotheses: Iterable[Hypothesis], x: Tensor, y: Tensor
) -> list[tuple[float, Hypothesis]]:
    """The hypotheses that can have this input, by relative L2 distance from the module's output y, nearest first."""
    ranked = []
    size = y.norm().clamp_min(1e-30)
    known: dict[Any, Any] = {}
    for hypothesis in hypotheses:
        try:
            expected, _ = _expected(candidate, hypothesis, x, known)
        except (NotIdentifiedError, ScconvDeployError, RuntimeError):
            continue  # shapes that this hypothesis cannot have
        if expected.shape == y.shape:
            distance = float((y - expected).norm() / size)
            ranked.append((distance if distance == distance else float("inf"), hypothesis))
    return sorted(ranked, key=lambda pair: pair[0])


@contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
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


def _expected(
    candidate: Candidate, hypothesis: Hypothesis, x: Tensor, known: dict[Any, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Output of the hypothesis for the module's input x, and the gate's own input.

    Args:
        known: cache of the hypotheses for this x: hundreds of them share a few normalisations and weights.
    """
    known = {} if known is None else known
    gate, variant = _gate(candidate, hypothesis), hypothesis.variant
    swapped, place = hypothesis.swapped_affine, hypothesis.conv_place
    of_gate = (swapped, place, variant.statistics, variant.num_groups, variant.eps)
    if of_gate not in known:
        if candidate.conv is not None and place == "before":
            x = candidate.conv(x)
        if x.shape[1] != gate.channels:
            raise NotIdentifiedError(f"{x.shape[1]} channels meet {gate.channels} parameters")
        check_groups(x.shape[1], variant.num_groups, x[0].numel())
        known[of_gate] = x, gate.normalize(x)
    if (swapped, variant.weighting) not in known:
        known[swapped, variant.weighting] = gate.weight
    x, normalized = known[of_gate]
    y = from_normalized(x, normalized, known[swapped, variant.weighting], variant)
    if candidate.conv is not None and place == "after":
        y = candidate.conv(y)
    return y, x


def _crowd(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its batch enlarged to at least ``_ENOUGH_GATES`` gates."""
    each = math.prod(shape[1:])
    return max(shape[0], -(-_ENOUGH_GATES // each)), *shape[1:]


def _shapes(own: tuple[int, ...], num_groups: int) -> list[tuple[int, ...]]:
    """The gate's inputs that a hypothesis is tried on: its own shape, one with more samples, one of another size."""
    _, channels, *size = own
    shapes = [own, _crowd(own)]
    others = [s for s in _OTHER_SIZES[len(size)] if s != tuple(size)]
    shapes += [(2, channels, *other) for other in others[:1] if channels * math.prod(other) % num_groups == 0]
    return list(dict.fromkeys(shapes))


def _accept(candidate: Candidate, hypothesis: Hypothesis, recorded: Tensor, seed: int) -> Identified:
    """Run the full test; raises NotIdentifiedError with the first disagreement."""
    gate = _gate(candidate, hypothesis)
    _, of_gate = _expected(candidate, hypothesis, recorded)
    flips, decided = 0.0, not _can_decide(gate, of_gate)
    own = tuple(of_gate.shape)
    for shape in _shapes(own, hypothesis.variant.num_groups):
        given = of_gate if shape == own else _noise(shape, seed)
        fed = recorded if shape == own else _noise((shape[0], recorded.shape[1], *shape[2:]), seed)
        try:
            share, found = _compare(candidate, gate, hypothesis.conv_place, given, fed, seed)
        except DoesNotRunError:
            if shape == own:
                raise
            continue  # it takes only its own size, or its own batch
        flips, decided = max(flips, share), decided or found
    if hypothesis.conv_place == "before":  # the probes bypassed the convolution
        expected, _ = _expected(candidate, hypothesis, recorded)
        _require_near(relative_l2(_run(candidate, "recorded", recorded), expected), "with its convolution")
    if not decided:
        raise NotIdentifiedError("no input was found on which >= and > differ, so its comparison is not known")
    return Identified(hypothesis, gate, flips)


def _noise(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1))


def _compare(
    candidate: Candidate, gate: Gate, place: ConvPlace, of_gate: Tensor, fed: Tensor, seed: int
) -> tuple[float, bool]:
    """Compare the module with a hypothesis on every probe of one shape.

    Args:
        of_gate: an input of the gate of that shape.
        fed: the module's own input for it.

    Returns:
        the largest share of explained flips, and whether a sigmoid was exactly the threshold.
    """
    flips, decided = 0.0, False
    for probe, x in probes(of_gate, gate, seed):
        name = f"{probe} input {'x'.join(map(str, x.shape))}"
        expected = gate.apply(x)
        y = _run_gate(candidate, place, name, x, fed)
        if y.shape != expected.shape or y.dtype != expected.dtype:
            raise DoesNotRunError(f"on {name} its output is {y.dtype}{list(y.shape)}")
        count, distance = compare_outputs(y, expected, x, gate)
        if count.unexplained:
            raise NotIdentifiedError(f"{count.unexplained} of {count.gates} gates differ beyond rounding on {name}")
        _require_near(distance, f"on {name}")
        r = gate.sigmoid(x)
        decided = decided or bool((r == gate.variant.threshold).any())
        cut_flips = gate.count_flips(compare(r, gate.variant) != open_by_cut(x, gate.form), x)
        if cut_flips.unexplained:
            raise NotIdentifiedError(f"the exact cut changes {cut_flips.unexplained} gates on {name}")
        flips = max(flips, count.flips / count.gates)
    return flips, decided


def _require_near(distance: float, where: str) -> None:
    if not distance <= VALUE_TOLERANCE:  # not (>), so that NaN is refused
        raise NotIdentifiedError(f"values differ by {distance:.1e} relative L2 {where}")


def _can_decide(gate: Gate, x: Tensor) -> bool:
    """Whether any input can tell >= from >: the sigmoid skips some float32 thresholds, and no element of L lies further
    than sqrt(L - 1) deviations out."""
    threshold = gate.variant.threshold
    elements = x[0].numel() / gate.variant.num_groups
    with np.errstate(invalid="ignore"):
        within = bool((np.abs(gate.form.cut) < math.sqrt(elements - 1)).any())
    return within and tau(threshold, ">=") != tau(threshold, ">")


def _run_gate(candidate: Candidate, place: ConvPlace, name: str, x: Tensor, recorded: Tensor) -> Tensor:
    """Output of the module's gate for x, the gate's own input; the module's convolution is bypassed."""
    if place == "none" or candidate.conv is None:
        return _run(candidate, name, x)
    seen: list[Tensor] = []

    def feed(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        seen.append(x)
        return x.clone()

    def watch(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0].clone())

    conv = candidate.conv
    handle = conv.register_forward_hook(feed) if place == "before" else conv.register_forward_pre_hook(watch)
    try:
        y = _run(candidate, name, recorded if place == "before" else x)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise NotIdentifiedError("its convolution is not called once, as a module, so that its gates cannot be probed")
    if place == "before":
        return y
    _require_near(relative_l2(y, conv(seen[0])), f"after its convolution on {name}")
    return seen[0]


def _run(candidate: Candidate, name: str, x: Tensor) -> Tensor:
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
