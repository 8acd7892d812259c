"""Hypotheses on a candidate, and which of them its behaviour on noise is nearest to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scconv_deploy.errors import ScconvDeployError
from scconv_deploy.gate.candidates import Candidate, ConvPlace
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.trial_run import DoesNotRunError, NotIdentifiedError, run
from scconv_deploy.gate.variant import (
    VARIANTS,
    GateVariant,
    Statistics,
    Weighting,
    check_groups,
    from_normalized,
    gate_weight,
)

_COMMON_GROUPS = (16, 4, 8, 32, 2, 1)
_COMMON_EPS = (1e-10, 1e-5, 1e-6, 1e-8, 1e-12, 1e-3, 1e-7, 1e-4, 1e-9)
_COMBINATIONS: tuple[Statistics, ...] = (
    "group_batchnorm",
    "biased_variance",
    "group_norm",
    "unbiased_variance",
    "biased_deviation",
)
_FEW = 2  # numbers of each kind with which a published variant is tried before anything is ranked
_NEAREST = 16  # how many of the hypotheses nearest to the behaviour are tried with every eps
OTHER_SIZES: dict[int, tuple[tuple[int, ...], ...]] = {
    0: (),
    1: ((64,), (72,)),
    2: ((8, 8), (12, 6), (4, 4)),
    3: ((4, 4, 4), (6, 4, 3), (4, 2, 2)),
    4: ((4, 4, 2, 2), (6, 3, 2, 2), (2, 2, 2, 2)),
    5: ((4, 2, 2, 2, 2), (3, 3, 2, 2, 2), (2, 2, 2, 2, 1)),
    6: ((2, 2, 2, 2, 2, 2), (3, 3, 2, 2, 2, 1), (2, 2, 2, 2, 1, 1)),
}
"""Probe sizes by the number of axes behind the channels. Hypotheses are ranked at the first; the module is tested at
one that is not its own, see :func:`other_shape`. Vectors ``[N, C]`` have none."""
_ENOUGH_GATES = 2**14
"""Fewest gates of a probe at the module's own height and width; the batch is enlarged to reach it. Differences that
rounding explains show in one of a hundred or a thousand gates on the threshold."""
_EPS_SCALES = (1e-3, 1e-6, 1e-10)  # of inputs on which an eps shows: in the variance, in the deviation
_CANCELLED = 1e-4  # how far two orders of a sum are apart, relatively, before noise tells them apart


@dataclass(frozen=True)
class Hypothesis:
    """Hypothesis on a candidate: its variant, which parameter is gamma, and where its convolution stands."""

    variant: GateVariant
    swapped_affine: bool = False
    conv_place: ConvPlace = "none"


def gate_of(candidate: Candidate, hypothesis: Hypothesis) -> Gate:
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


def published(candidate: Candidate) -> Iterator[Hypothesis]:
    """The published variants, with the numbers that the module itself holds where it holds any. A variant's own number
    of groups is tried too: a small whole number in a module can be anything."""
    channels, numbers = candidate.affine[0].numel(), dict.fromkeys(_numbers(candidate.module))
    norms = [m for m in candidate.module.modules() if isinstance(m, nn.GroupNorm)]
    for variant in VARIANTS.values():
        if bool(norms) != (variant.statistics == "group_norm"):
            continue
        groups = [m.num_groups for m in norms] or [int(v) for v in numbers if v == int(v) and 1 < v < channels]
        eps = [m.eps for m in norms] or [v for v in numbers if 0 < v <= 1e-3]
        thresholds = [v for v in numbers if 0.01 < v < 1]
        for num_groups, own_eps, threshold in product(
            dict.fromkeys([*groups[:_FEW], *([] if norms else [variant.num_groups])]),
            eps[:_FEW] or [variant.eps],
            thresholds[:_FEW] or [variant.threshold],
        ):
            chosen = replace(variant, num_groups=num_groups, eps=own_eps, threshold=threshold)
            yield Hypothesis(chosen, False, candidate.conv_places[0])


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


def rank(candidate: Candidate, recorded: Tensor, seed: int) -> list[tuple[float, Hypothesis]]:
    """Hypotheses by relative L2 distance on one small input, nearest first; then, with every eps, on tiny ones."""
    generator = torch.Generator().manual_seed(seed)
    own = tuple(recorded.shape)
    small = [(2, own[1], *size) for size in OTHER_SIZES[len(own) - 2][:1]]
    for shape in (*small, crowd(own), own):  # a module may take only its own size, or batch
        x = torch.randn(shape, generator=generator)
        try:
            y = run(candidate, "normal", x)
            break
        except DoesNotRunError:
            if shape == own:
                raise
    coarse = _by_distance(candidate, _hypotheses(candidate), x, y)
    tiny = [(x * scale, run(candidate, "tiny", x * scale)) for scale in _EPS_SCALES]
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
            expected, _ = expected_output(candidate, hypothesis, x, known)
        except (NotIdentifiedError, ScconvDeployError, RuntimeError):
            continue  # shapes that this hypothesis cannot have
        if expected.shape == y.shape:
            distance = float((y - expected).norm() / size)
            ranked.append((distance if distance == distance else float("inf"), hypothesis))
    return sorted(ranked, key=lambda pair: pair[0])


def expected_output(
    candidate: Candidate, hypothesis: Hypothesis, x: Tensor, known: dict[Any, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Output of the hypothesis for the module's input x, and the gate's own input.

    Args:
        known: cache of the hypotheses for this x: hundreds of them share a few normalisations and weights.
    """
    known = {} if known is None else known
    gate, variant = gate_of(candidate, hypothesis), hypothesis.variant
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


def other_shape(own: tuple[int, ...], num_groups: int) -> tuple[int, ...] | None:
    """A shape of another height and width: the last size where the others have more gates than are needed.

    None for vectors, and where the groups do not divide it.
    """
    _, channels, *size = own
    shapes = [(2, channels, *s) for s in OTHER_SIZES[len(size)] if s != tuple(size)]
    shapes = [shape for shape in shapes if math.prod(shape[1:]) % num_groups == 0]
    return next((shape for shape in shapes if math.prod(shape) <= _ENOUGH_GATES), shapes[-1] if shapes else None)


def crowd(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its batch enlarged to at least ``_ENOUGH_GATES`` gates."""
    each = math.prod(shape[1:])
    return max(shape[0], -(-_ENOUGH_GATES // each)), *shape[1:]
