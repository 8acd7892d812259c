"""Seeded inputs that tell variants of the gate apart."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import GateVariant, per_channel

_LARGEST_SHARE = 0.75  # of a group's elements that may be moved
_CARRIED = 0.5  # share of a group's variance in moved elements
_FIXED_POINT_STEPS = 60  # each halves the error at least, where half of the variance is carried
_SOLVED = 1e-9
_BESIDE_EPS = (1e2, 1.0, 1e-2)
"""Deviations of probes in units of eps, at which eps matters. In groups of two elements ``n`` is the same for every
input whose deviation is far larger than eps, so ddof and eps show nowhere else."""


def probes(recorded: Tensor, gate: Gate, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Seeded inputs of a gate with their names, ``[N, C, *]`` each.

    Args:
        recorded: an input from the model itself, ``[N, C, *]``; it comes last.
    """
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(recorded.shape, generator=generator)
    yield "normal", base
    # first without, then with an eps that matters beside the deviation
    eps = gate.variant.eps_std or math.sqrt(gate.variant.eps_var)
    scales = {"near-threshold": 1.0, "small near-threshold": 1e-3, "tiny near-threshold": 1e-6}
    scales |= {f"near-threshold (deviations of {factor:g} eps)": factor * eps for factor in _BESIDE_EPS}
    for name, scale in scales.items():
        yield name, near_threshold(base * scale, gate, generator)
    for rival in rivals(gate):
        if rival.variant.weighting != gate.variant.weighting:
            yield "mirrored near-threshold", mirrored(base, gate, rival, generator)
    alternate = (torch.arange(len(base)) % 2).float()
    yield "constant", alternate.reshape(-1, *(1,) * (base.dim() - 1)).expand_as(base).contiguous()
    yield "large-mean", base + 100
    yield "large", base * 1e4
    yield "rectified", base.relu()
    yield "recorded", recorded


def few_probes(recorded: Tensor, gate: Gate, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Those of :func:`probes` that can depend on the shape: on the threshold, and the model's own input."""
    generator = torch.Generator().manual_seed(seed)
    yield "near-threshold", near_threshold(torch.randn(recorded.shape, generator=generator), gate, generator)
    yield "recorded", recorded


def rivals(gate: Gate) -> Iterator[Gate]:
    """The gates that noise cannot tell from this one: the other comparison, and the other order of the sum where it
    rounds to other weights. Those with weights that are not finite are left out: in one order the sum can be 0."""
    variant = gate.variant
    others = [replace(variant, comparison=">" if variant.comparison == ">=" else ">=")]
    if variant.weighting in ("sum", "torch_sum"):
        others.append(replace(variant, weighting="torch_sum" if variant.weighting == "sum" else "sum"))
    for other in (Gate(v, gate.gamma, gate.beta) for v in others):
        known = other.variant.weighting != variant.weighting and torch.equal(other.weight, gate.weight)
        if not known and torch.isfinite(other.weight).all():
            yield other


def near_threshold(base: Tensor, gate: Gate, generator: torch.Generator) -> Tensor:
    """Noise, a part of which is moved to the gate's boundary: half, or less where the boundary lies far out.

    Of the moved elements, half lie around the boundary at relative distances from 1e-6 to 0.1 (they tell ddof and
    eps apart) and half between this boundary and that of one of the :func:`rivals` (they tell these apart).
    """
    variant = gate.variant
    near = _boundary(gate, base)
    others = torch.stack([_boundary(rival, base).expand(base.shape) for rival in rivals(gate)])
    chosen = torch.randint(len(others), base.shape, generator=generator)
    far = others.gather(0, chosen[None])[0]
    # moved elements must not carry the deviation alone: share * boundary^2 < 1; NaN (sign 0) compares false
    share = (_CARRIED / torch.maximum(near.abs(), far.abs()).square()).clamp(max=0.5)
    moved = torch.rand(base.shape, generator=generator) < share
    grouped = moved.reshape(base.shape[0], variant.num_groups, -1)
    # a tiny group can be moved as a whole by chance: nothing would hold its mean
    moved = (grouped & (grouped.double().mean(dim=2, keepdim=True) <= _LARGEST_SHARE)).reshape(base.shape)
    between = torch.rand(base.shape, generator=generator) < 0.5
    along = torch.rand(base.shape, generator=generator, dtype=torch.float64)
    distance = 10 ** (-1 - 5 * along) * torch.where(torch.rand(base.shape, generator=generator) < 0.5, -1.0, 1.0)
    target = torch.where(between, near + along * (far - near), near * (1 + distance))
    mean, s, solved = _solve_statistics(base.double(), moved, target.where(moved, 0.0), variant)
    placed = (mean + s * target.reshape(base.shape[0], variant.num_groups, -1)).reshape(base.shape)
    moved = (moved.reshape(base.shape[0], variant.num_groups, -1) & solved).reshape(base.shape)
    return torch.where(moved, placed, base.double()).float()


def mirrored(base: Tensor, gate: Gate, rival: Gate, generator: torch.Generator) -> Tensor:
    """Noise in neighbours ``v, -v``, a quarter of which lies between the gate's boundary and a rival's.

    Two orders of a sum move a boundary by millionths of itself, and with t = 0.5 and beta = 0 the boundary is about
    1e-7 deviations from the mean. Only where the mean is 0 does float32 have numbers there; so the sum of a group must
    cancel to the bit, which neighbours do in every order of adding them that processors use.
    """
    elements = base[0].numel() // gate.variant.num_groups
    grouped = base.double().reshape(len(base), gate.variant.num_groups, elements).clone()
    near, far = (_boundary(of, base).expand(base.shape).reshape(grouped.shape) for of in (gate, rival))
    along = torch.rand(grouped.shape, generator=generator, dtype=torch.float64)
    target = near + along * (far - near)
    moved = (torch.rand(grouped.shape, generator=generator) < 0.5) & (target.square() < _CARRIED)  # NaN compares false
    moved[..., 1::2] = False
    grouped[..., elements - elements % 2 :] = 0
    value = grouped.where(~moved, 0.0)
    squares, moved_squares = (
        (2 * part.square()[..., : elements - elements % 2 : 2]).sum(dim=2, keepdim=True)
        for part in (value, target.where(moved, 0.0))
    )
    # s^2 = (squares + s^2 * moved_squares) / freedom: what eps adds is left out, for deviations here are about 1
    s = (squares / (elements - gate.variant.ddof - moved_squares).clamp(min=1)).sqrt()
    placed = torch.where(moved, s * target, grouped).float()
    pairs = elements // 2
    placed[..., 1 : 2 * pairs : 2] = -placed[..., : 2 * pairs : 2]
    return placed.reshape(base.shape)


def _boundary(gate: Gate, like: Tensor) -> Tensor:
    """Where the gate opens, in deviations from the mean: float64, for each channel."""
    return per_channel(torch.as_tensor(gate.form.sign * gate.form.cut).double(), like)


def _solve_statistics(
    base: Tensor, moved: Tensor, target: Tensor, variant: GateVariant
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and s of a group whose moved elements lie at ``mean + s * target``: moving them moves both.

    A fixed point over sums of each group. It converges where the moved elements carry half of the variance at most. Few
    elements carry more by chance, and of two elements neither can lie at its target unless eps matters.

    Args:
        base, target: float64 ``[N, C, *]``; target is 0 where nothing is moved.

    Returns:
        mean, s, and where there is a solution; ``[N, G, 1]`` each.
    """
    shape = (base.shape[0], variant.num_groups, -1)

    def total(values: Tensor) -> Any:  # NumPy's, which starts an operation on a few numbers faster than torch
        return values.reshape(shape).sum(dim=2, keepdim=True).numpy()

    stays = (~moved).double()
    count, first, second = total(stays), total(stays * base), total(stays * base.square())
    target1, target2 = total(target), total(target.square())
    freedom = base[0].numel() / variant.num_groups - variant.ddof
    s = np.sqrt(total(base.square()) / freedom)  # a start: the base is noise about 0
    before = s
    with np.errstate(all="ignore"):
        for _ in range(_FIXED_POINT_STEPS):
            before = s
            mean = (first + s * target1) / count
            squares = second - 2 * mean * first + count * np.square(mean) + np.square(s) * target2
            s = np.sqrt(squares / freedom + variant.eps_var) + variant.eps_std
        solved = np.abs(s - before) <= _SOLVED * s  # NaN compares false
    return torch.from_numpy(mean), torch.from_numpy(s), torch.from_numpy(solved)
