"""The static link of the weights: each stored one is the reference's, or it with a BatchNorm folded in.

The only catch for a low bit of one weight: no input shows it above the rounding of the sums that it is part of.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import cached_property

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper

from scconv_deploy.graph.types import NUMPY
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck
from scconv_deploy.verification.reference.run import Arrays, ReferenceSource

NAME = "weights"
_AT_ONCE = 2**16
"""Entries compared at a time, in float64: they stay in the cache."""
_RATIOS = 31
"""Entries of a channel, spread over it, that its factor is the median of; up to twice as many."""


class Weights(ArtifactCheck):
    """The static link of the weights."""

    def __init__(self, source: ReferenceSource, model: onnx.ModelProto, limit_ulps: float) -> None:
        self._source, self._model, self._limit_ulps = source, model, limit_ulps

    @cached_property
    def found(self) -> Check:
        stored = self._source.weights
        if not len(stored):
            return Check(NAME, "not run", "the reference holds no weights to compare with")
        return check(self._model, stored, self._limit_ulps)

    def checks(self) -> list[Check]:
        return [self.found]


def check(model: onnx.ModelProto, weights: Arrays, limit_ulps: float) -> Check:
    """Compare the initializers that have the name and the shape of a weight of the reference.

    A weight of two or more axes may be scaled by one factor for each output channel (axis 0), which is what folding a
    BatchNorm does; the factor itself is not judged here, for it shows in every output of the channel.

    One of a single axis (a bias, a BatchNorm's) is the reference's bit for bit, unless the weight beside it was folded.
    A weight in half is the reference's rounded to half, or it counts as folded: rounding makes other factors look
    like 1, so that fewer than ``limit_ulps`` of half's last places do not show.

    Args:
        weights: of the reference, by name.
        limit_ulps: how far an entry may be off, in units of its own last place.
    """
    same = folded = 0
    rounded = ""
    worst = 0.0
    problems, others = [], []
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in stored.values():
        expected = weights.get(tensor.name)
        if expected is None or expected.dtype not in (np.float32, *NUMPY.values()):
            continue
        actual = numpy_helper.to_array(tensor)
        stored_as = expected
        if actual.dtype in NUMPY.values():
            with np.errstate(over="ignore"):  # what half cannot hold differs then
                stored_as = expected.astype(actual.dtype)
            rounded = f", rounded to {actual.dtype}"
        if actual.shape != expected.shape or actual.dtype != stored_as.dtype:
            others.append(tensor.name)
        elif _same_bits(actual, stored_as):
            same += 1
        elif actual.ndim == 1 and _must_be_equal(tensor.name, stored, weights):
            worst = np.inf
            problems.append(f"{tensor.name} is not the reference's bit for bit")
        elif (off := _off_scale(actual, expected)) is None:
            others.append(tensor.name)
        else:
            worst = max(worst, off)
            if off <= limit_ulps:
                folded += 1
                continue
            how = f"{off:.3g} units in the last place off" if np.isfinite(off) else "not the reference's bit for bit"
            problems.append(f"{tensor.name} is {how} (limit {limit_ulps:g} where a BatchNorm was folded in)")
    decided = (Quantity("weight_ulps", worst, limit_ulps),)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Check(NAME, "failed", problems[0] + more, decided)
    if not same and not folded:
        return Check(NAME, "not run", "no stored weight has the name of one of the reference's")
    text = f"{same} weights are the reference's bit for bit{rounded}, {folded} but for a factor of each channel"
    return Check(NAME, "passed", text + _not_compared(stored, weights, others), decided)


def _not_compared(stored: Container[str], weights: Arrays, others: Sequence[str]) -> str:
    """What the check says nothing of: a file may hold a weight under another name, or in another form."""
    matrices = [name for name, value in weights.items() if value.ndim >= 2 and value.size > len(value)]
    missing = [name for name in matrices if name not in stored]
    text = ""
    for names, what in ((others, "of another form"), (missing, "not in the file under its name")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            text += f"; not compared, {what}: {names[0]}{more}"
    return text


def _must_be_equal(name: str, stored: Mapping[str, onnx.TensorProto], weights: Arrays) -> bool:
    """Whether nothing can have been folded into a vector: its module's weight is a vector too, or as it was."""
    weight = f"{name.rpartition('.')[0]}.weight"
    if weight not in stored or weight not in weights:
        return False
    actual, expected = numpy_helper.to_array(stored[weight]), weights[weight]
    with np.errstate(over="ignore"):
        return expected.ndim == 1 or _same_bits(actual, expected.astype(actual.dtype))


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Of two arrays of one shape and type."""
    bits = np.dtype(f"u{one.itemsize}")
    return bool(np.array_equal(np.ascontiguousarray(one).view(bits), np.ascontiguousarray(other).view(bits)))


def _off_scale(actual: np.ndarray, expected: np.ndarray) -> float | None:
    """The largest distance of an entry from the scaled reference, in units of its last place, a few rows at a time.

    Infinite where a channel that was not folded differs at all, or an entry is not finite. None for a vector.
    """
    if actual.ndim < 2 or not actual.size:
        return None
    a, b = (v.reshape(len(v), -1) for v in (actual, expected))
    rows = max(1, _AT_ONCE // a.shape[1])
    parts = [slice(start, start + rows) for start in range(0, len(a), rows)]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # of entries that are not finite
        factor = _factors(a, b)
        worst = np.max([_units(a[part], b[part], factor[part]) for part in parts])
    return np.inf if np.isnan(worst) else float(worst)


def _units(a: np.ndarray, b: np.ndarray, factor: np.ndarray) -> float:
    """The same of some channels ``[rows, entries]`` with their factors ``[rows, 1]``."""
    if a.dtype == np.float32:  # rounding to half makes other factors look like 1
        differs, counts = a != b, b != 0
        left = np.count_nonzero(differs & counts, axis=1)
        if (differs.any(axis=1) & (2 * left < np.count_nonzero(counts, axis=1))).any():
            return np.inf  # most entries are equal, so it was not folded: every bit counts
    kind = ml_dtypes.finfo(a.dtype)
    scaled = factor * b
    off = np.abs(a - scaled)
    last_place = np.maximum(np.abs(scaled, out=scaled), float(kind.tiny), out=scaled)
    return float(np.max(off / last_place)) / float(kind.eps)


def _factors(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The factor of each channel, float64 ``[rows, 1]``: the median of a few ratios, so that a damaged entry does not
    move it. Which entries they are does not matter to the verdict: if no factor fits all of them, this one does not.
    """
    some = slice(None, None, max(1, a.shape[1] // _RATIOS))
    factor = _median_ratio(a[:, some], b[:, some])
    thin = (b[:, some] == 0).any(axis=1)  # a pruned channel has its few other entries elsewhere
    if thin.any():
        factor[thin] = _median_ratio(a[thin], b[thin])
    return factor


def _median_ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row, entries with b = 0 left out; 0 where there is no other."""
    known = b != 0
    ratios = np.divide(a, b, out=np.full(a.shape, np.inf), where=known, dtype=np.float64)
    ratios.sort(axis=1)  # what is left out comes last
    count = np.count_nonzero(known, axis=1)
    row = np.arange(len(a))
    median = (ratios[row, np.maximum(count - 1, 0) // 2] + ratios[row, np.minimum(count // 2, a.shape[1] - 1)]) / 2
    return np.where(count > 0, median, 0.0)[:, None]
