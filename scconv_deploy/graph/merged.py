"""Weights of a CRU whose convolutions were merged, by name: how each is computed from the module's own. NumPy alone.

The name of a merged weight says what it was made of, ``cru-paths(GWC.weight,PWC1.weight,PWC2.weight)``, so that
verification computes it again from the reference's weights, in any file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

_NAME = re.compile(r"^cru-(?P<kind>\w+)\((?P<parts>.+)\)(#\d+)?$")


def squeeze(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Both squeezes as one 1x1 convolution of all channels: in two groups where they are of one shape.

    Args:
        first, second: ``[S, C', 1, ...]``, of the upper and of the lower channels.
    """
    return _side_by_side(first, second)


def paths(gwc: np.ndarray, pwc1: np.ndarray, pwc2: np.ndarray | None = None) -> np.ndarray:
    """Both paths as one convolution of the squeezed channels, ``[2C, *]``: in two groups where these are as many.

    The upper path is ``GWC(u) + PWC1(u)``: dense weights, PWC1 added to GWC's centre in float64, rounded once. The
    lower path is ``cat(PWC2(l), l)``: ``[PWC2; I]`` at the centre.

    Args:
        gwc: ``[C, U / groups, *K]`` with an odd kernel K.
        pwc1: ``[C, U, 1, ...]``.
        pwc2: ``[C - L, L, 1, ...]``; None where the squeezed lower channels are the path.
    """
    out, up, *_ = pwc1.shape
    low = out if pwc2 is None else pwc2.shape[1]
    centre = tuple(size // 2 for size in gwc.shape[2:])
    upper = np.zeros((out, up, *gwc.shape[2:]), np.float64)
    width = gwc.shape[1]
    rows = out // (up // width)
    for group in range(up // width):
        here = slice(group * rows, (group + 1) * rows)
        upper[here, group * width : (group + 1) * width] = gwc[here]
    upper[:, :, *centre] += pwc1.reshape(out, up)
    lower = np.zeros((out, low, *gwc.shape[2:]), gwc.dtype)
    identity = np.eye(low, dtype=gwc.dtype)
    lower[:, :, *centre] = identity if pwc2 is None else np.concatenate([pwc2.reshape(-1, low), identity])
    return _side_by_side(upper.astype(gwc.dtype), lower)


def bias(gwc: np.ndarray) -> np.ndarray:
    """The bias of :func:`paths`: GWC's, and zeros for the lower path."""
    return np.concatenate([gwc, np.zeros_like(gwc)])


MERGES: Mapping[str, Callable[..., np.ndarray]] = {"squeeze": squeeze, "paths": paths, "bias": bias}


def groups_of(weight: np.ndarray, in_channels: int) -> int:
    """Groups of a convolution with merged weights on this many channels."""
    return in_channels // int(weight.shape[1])


def merged_name(kind: str, parts: Sequence[str]) -> str:
    """Name of a merged weight."""
    return f"cru-{kind}({','.join(parts)})"


def parts_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """(kind, names of the parts) of a merged weight; None for any other name."""
    found = _NAME.match(name)
    if found is None or found["kind"] not in MERGES:
        return None
    return found["kind"], tuple(found["parts"].split(","))


def _side_by_side(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Weights of two convolutions on neighbouring channels: in groups if they are of one shape, else with zeros."""
    if upper.shape == lower.shape:
        return np.concatenate([upper, lower])
    both = np.zeros((len(upper) + len(lower), upper.shape[1] + lower.shape[1], *upper.shape[2:]), upper.dtype)
    both[: len(upper), : upper.shape[1]] = upper
    both[len(upper) :, upper.shape[1] :] = lower
    return both
