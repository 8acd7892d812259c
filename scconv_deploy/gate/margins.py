"""Margins of gates in NumPy: which flips rounding explains, and which it does not.

**On the same input.** Two implementations that are both right still sum in different orders. With u = 2**-24 and L
elements in a group, each computes the margin ``m = sign * (x - mean) - s * cut`` to within half of ::

    B = u * [ k * mean|x| + 2 * |x - mean| + (k + 4) * s * cut_scale ]        k = log2(L) + 4
      + u * 4 * (|x| + |mean| + s * cut_scale)                                only nn.GroupNorm

- ``k * mean|x|``: the mean by pairwise summation (error log2(L) * u * mean|x|), rounded once more;
- ``|x - mean|``: one subtraction;
- ``s * cut_scale``: s by the same sums, and the rounding of the two terms whose difference is the cut;
- nn.GroupNorm is uncentred inside PyTorch (``x * scale + shift``) and takes its variance in float32.

Naive summation is not covered: a runtime that sums a group in one go is less exact than this, and fails.

A flip with ``|m| <= B`` (m in float64) is explained; every other flip is a fault.

**Running free** the two sides decide on different inputs: x_r of the reference, x_a of the artifact, which carries the
rounding (and the flips) of everything before. The measured error of the input, propagated into the margin, is
``m(x_r) - m(x_a)``, exact in float64. A reference that is right has its gate open only if ``m(x_r) >= -B/2``; an
artifact that is right has it closed only if ``m(x_a) < B/2``. So with d = 1 where the reference is open and -1 where it
is closed, a flip between two right implementations has ::

    d * m(x_r) >= -B    and    d * m(x_r) <= d * (m(x_r) - m(x_a)) + B        B: the larger one of x_r and x_a

and is explained; every other flip is a fault. The error counts with its direction: an input that moved away from the
threshold explains nothing. With x_a = x_r both conditions are ``|m| <= B``, the rule for the same input. Whether the
error of the input itself is in order is not asked here: the replay with the reference's gates judges that.

Groups with s below ``1e-6 * |mean|`` are ill-conditioned: PyTorch itself has no answer there. Their flips are counted
apart and not judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from scconv_deploy.records.gates import ILL_CONDITIONED, FlipCount

UNIT_ROUNDOFF = 2.0**-24
LARGEST_WEIGHT_ERROR = 1e-3
"""Relative error of a gate weight ``gamma / sum(gamma)`` beyond which the sum is lost to rounding."""
_SMALLEST_EXPONENT, _LARGEST_EXPONENT = -24, 4
MARGIN_EDGES = tuple(2.0**k for k in range(_SMALLEST_EXPONENT, _LARGEST_EXPONENT + 1))
"""Bin edges of the histograms of ``|margin| / s``: powers of two from 2**-24 to 2**4."""


@dataclass(frozen=True, eq=False)
class GateForm:
    """Parameters of a gate's margin.

    Attributes:
        num_groups, ddof, eps_var, eps_std: of ``s = sqrt(SS / (L - ddof) + eps_var) + eps_std``.
        uncentred: the reference computes ``x * scale + shift`` (nn.GroupNorm), which widens the bound.
        cut: float32 ``[C]``; the boundary in units of s, on the side that ``sign`` points to.
        sign: float32 ``[C]``; -1, 0 or 1. Where it is 0 the gate does not depend on x: cut is -inf (open) or inf.
        cut_scale: float64 ``[C]``; ``(|tau / w| + |beta|) / |gamma|``, the sum of the sizes of the two terms whose
            difference is the cut. Their rounding, not the cut's alone, limits how exactly the gate is known.
    """

    num_groups: int
    ddof: int
    eps_var: float
    eps_std: float
    uncentred: bool
    cut: np.ndarray
    sign: np.ndarray
    cut_scale: np.ndarray


@dataclass(frozen=True, eq=False)
class Margins:
    """Margins of the gates of one SRU; every array is ``[N, C, *]``.

    Attributes:
        margin, bound: float64, in x's units; ``bound`` is how far rounding can move the margin.
        spread: float64, s of the group.
        ill: bool, where the group is ill-conditioned.
    """

    margin: np.ndarray
    bound: np.ndarray
    spread: np.ndarray
    ill: np.ndarray


def margins(x: np.ndarray, form: GateForm) -> Margins:
    """Margins of the gates for the input x, floating ``[N, C, *]``, in float64."""
    x64 = np.asarray(x, dtype=np.float64)
    groups = x64.reshape(x.shape[0], form.num_groups, -1)
    length = groups.shape[2]
    mean = groups.mean(axis=2, keepdims=True)
    centred_groups = groups - mean
    with np.errstate(divide="ignore", invalid="ignore"):
        variance = np.square(centred_groups).sum(axis=2, keepdims=True) / (length - form.ddof)
        s = np.sqrt(variance + form.eps_var) + form.eps_std

    def spread_out(per_group: np.ndarray) -> np.ndarray:
        return np.broadcast_to(per_group, groups.shape).reshape(x.shape)

    centred, spread = centred_groups.reshape(x.shape), spread_out(s)
    sign, cut, cut_scale = (_per_channel(v, x).astype(np.float64) for v in (form.sign, form.cut, form.cut_scale))
    k = math.log2(length) + 4
    size = spread_out(np.abs(groups).mean(axis=2, keepdims=True))
    bound = k * size + 2 * np.abs(centred) + (k + 4) * spread * cut_scale
    if form.uncentred:
        bound = bound + 4 * (np.abs(x64) + spread_out(np.abs(mean)) + spread * cut_scale)
    ill = spread_out(s < ILL_CONDITIONED * np.abs(mean))
    with np.errstate(invalid="ignore"):  # a cut of inf and a spread of 0 make NaN: unexplained
        return Margins(sign * centred - spread * cut, UNIT_ROUNDOFF * bound, spread, ill)


def _per_channel(values: np.ndarray, x: np.ndarray) -> np.ndarray:
    return values.reshape(-1, *(1,) * (x.ndim - 2))


def decide(x: np.ndarray, form: GateForm) -> np.ndarray:
    """Gate mask for the input x, decided in float64; bool ``[N, C, *]``."""
    with np.errstate(invalid="ignore"):
        return margins(x, form).margin >= 0


def count_flips(differs: np.ndarray, x: np.ndarray, form: GateForm) -> FlipCount:
    """Sort the gates that differ on the same input into explained, unexplained and ill-conditioned ones.

    Args:
        differs: bool ``[N, C, *]``.
        x: the input both sides were given, ``[N, C, *]``.
    """
    if not differs.any():
        return FlipCount(gates=differs.size)
    rows = differs.reshape(len(differs), -1).any(axis=1)
    found, flipped = margins(x[rows], form), differs[rows]
    with np.errstate(invalid="ignore"):
        explained = np.abs(found.margin) <= found.bound
    return _count(differs.size, flipped, explained, found)


def count_free_flips(
    reference: np.ndarray, artifact: np.ndarray, x_reference: np.ndarray, x_artifact: np.ndarray, form: GateForm
) -> FlipCount:
    """Sort the gates that differ between reference and artifact running free, each with its own input.

    Args:
        reference, artifact: the gate masks, bool ``[N, C, *]``.
        x_reference, x_artifact: the gates' inputs, ``[N, C, *]``.
    """
    differs = reference != artifact
    if not differs.any():
        return FlipCount(gates=differs.size)
    rows = differs.reshape(len(differs), -1).any(axis=1)
    found, moved = margins(x_reference[rows], form), margins(x_artifact[rows], form)
    direction = np.where(reference[rows], 1.0, -1.0)
    bound = np.maximum(found.bound, moved.bound)
    with np.errstate(invalid="ignore"):
        towards = direction * (found.margin - moved.margin)
        explained = (direction * found.margin >= -bound) & (direction * found.margin <= towards + bound)
    return _count(differs.size, differs[rows], explained, found, moved.ill)


def _count(
    gates: int, differs: np.ndarray, explained: np.ndarray, found: Margins, also_ill: np.ndarray | None = None
) -> FlipCount:
    ill = found.ill if also_ill is None else found.ill | also_ill
    flips = differs & ~ill
    if not flips.any():
        return FlipCount(gates=gates, ill_conditioned=int(differs.sum()))
    return FlipCount(
        gates=gates,
        flips=int(flips.sum()),
        # not (explained), so that a margin that is not a number counts as unexplained
        unexplained=int((flips & ~explained).sum()),
        ill_conditioned=int((differs & ill).sum()),
        channels=int(flips.any(axis=(0, *range(2, flips.ndim))).sum()),
        largest_margin=float((np.abs(found.margin[flips]) / found.spread[flips]).max()),
    )


def histogram(x: np.ndarray, form: GateForm) -> np.ndarray:
    """Histogram of ``|margin| / s`` with the bin edges :data:`MARGIN_EDGES`; int64, one fewer than edges.

    In float32: a histogram needs no more, and it is taken of every gate. The bins are powers of two, so that the
    exponent of a float32 is its bin.
    """
    groups = np.asarray(x, dtype=np.float32).reshape(x.shape[0], form.num_groups, -1)
    centred = groups - groups.mean(axis=2, keepdims=True)
    squares = np.einsum("ngl,ngl->ng", centred, centred)[:, :, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        s = np.sqrt(squares / np.float32(groups.shape[2] - form.ddof) + np.float32(form.eps_var))
        centred /= s + np.float32(form.eps_std)
        margin = centred.reshape(x.shape)
        margin *= _per_channel(form.sign, x)
        margin -= _per_channel(form.cut, x)
    exponents = (margin.view(np.uint32) >> 23 & 255).astype(np.int16) - 127
    bins = np.clip(exponents, _SMALLEST_EXPONENT, _LARGEST_EXPONENT - 1) - _SMALLEST_EXPONENT
    return np.bincount(bins.ravel(), minlength=len(MARGIN_EDGES) - 1)
