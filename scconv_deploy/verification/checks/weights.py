"""Static check of the weights: each stored weight is the reference's, or the reference's with a BatchNorm folded in.

Weights of a CRU's merged convolutions (:mod:`scconv_deploy.graph.merged`) are computed again from the reference's.

Only this check finds a wrong low bit of one weight: in the outputs it is below the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import cached_property

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper

from scconv_deploy.graph import merged
from scconv_deploy.graph.types import NUMPY
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck
from scconv_deploy.verification.reference.run import Arrays, ReferenceSource

NAME = "weights"
_AT_ONCE = 2**16
"""Entries compared at a time, in float64: they fit into the cache."""
_RATIOS = 31
"""Number of entries, spread over a channel, whose median ratio is its factor; at most twice as many are taken."""


class Weights(ArtifactCheck):
    """Static check of the weights."""

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
    """Compare the initializers that have the name and shape of a weight of the reference.

    A weight of two or more axes may be scaled by one factor for each output channel (axis 0), as folding a BatchNorm
    does. The factor itself is not judged here: it shows in every output of the channel.

    A vector (a bias, a BatchNorm's parameters) must be the reference's bit for bit, unless its module's weight was
    folded. A weight in half is the reference's rounded to half, or counts as folded: rounding makes other factors look
    like 1, so errors below ``limit_ulps`` of half's last places do not show.

    Args:
        weights: weights of the reference by name.
        limit_ulps: largest error of an entry, in units of its own last place.
    """
    same = folded = 0
    rounded = ""
    problems, others = [], []
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    of_crus = _Merged(stored, weights)
    problems += of_crus.problems
    worst = np.inf if problems else 0.0
    for tensor in stored.values():
        expected = weights.get(tensor.name)
        if expected is None or expected.dtype not in (np.float32, *NUMPY.values()):
            continue
        actual = numpy_helper.to_array(tensor)
        stored_as = expected
        if actual.dtype in NUMPY.values():
            with np.errstate(over="ignore"):  # values that overflow in half then differ
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
    if not same and not folded and not of_crus.same:
        return Check(NAME, "not run", "no stored weight has the name of one of the reference's")
    text = f"{same} weights are the reference's bit for bit{rounded}, {folded} but for a factor of each channel"
    if of_crus.same:
        text += f", {of_crus.same} of merged convolutions are what the reference's give"
    others += of_crus.unknown
    return Check(NAME, "passed", text + _not_compared({*stored, *of_crus.parts}, weights, others), decided)


class _Merged:
    """Merged weights of CRUs against those computed from the reference's.

    Attributes:
        same: how many are equal bit for bit.
        problems: the others.
        unknown: names of merged weights of none of whose parts the reference knows.
        parts: names of the reference's weights that were merged.
    """

    def __init__(self, stored: Mapping[str, onnx.TensorProto], weights: Arrays) -> None:
        self.same = 0
        self.problems: list[str] = []
        self.unknown: list[str] = []
        self.parts: set[str] = set()
        for name, tensor in stored.items():
            found = None if name in weights else merged.parts_of(name)
            if found is None:
                continue
            kind, parts = found
            if not any(part in weights for part in parts):
                self.unknown.append(name)
                continue
            self.parts |= set(parts)
            if problem := _merge_problem(numpy_helper.to_array(tensor), kind, [weights.get(part) for part in parts]):
                self.problems.append(f"{name} {problem}")
            else:
                self.same += 1


def _merge_problem(actual: np.ndarray, kind: str, parts: Sequence[np.ndarray | None]) -> str:
    """Why a merged weight is not what the reference's weights give; "" if it is, bit for bit."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return "is merged of weights of which the reference does not know all"
    try:
        expected = merged.MERGES[kind](*known)
    except (
        TypeError,
        ValueError,
        IndexError,
        ZeroDivisionError,
    ) as error:  # NumPy's reasons, of weights of other shapes
        return f"cannot be merged of the reference's weights: {error}"
    with np.errstate(over="ignore"):
        expected = expected.astype(actual.dtype)
    same = actual.shape == expected.shape and _same_bits(actual, expected)
    return "" if same else "is not what the reference's weights give, bit for bit"


def _not_compared(stored: Container[str], weights: Arrays, others: Sequence[str]) -> str:
    """End of the reason: weights not compared, because the file holds them under another name or in another form."""
    matrices = [name for name, value in weights.items() if value.ndim >= 2 and value.size > len(value)]
    missing = [name for name in matrices if name not in stored]
    text = ""
    for names, what in ((others, "of another form"), (missing, "not in the file under its name")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            text += f"; not compared, {what}: {names[0]}{more}"
    return text


def _must_be_equal(name: str, stored: Mapping[str, onnx.TensorProto], weights: Arrays) -> bool:
    """Whether nothing can be folded into a vector: its module's weight is a vector too, or was not changed."""
    weight = f"{name.rpartition('.')[0]}.weight"
    if weight not in stored or weight not in weights:
        return False
    actual, expected = numpy_helper.to_array(stored[weight]), weights[weight]
    with np.errstate(over="ignore"):
        return expected.ndim == 1 or _same_bits(actual, expected.astype(actual.dtype))


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two arrays of one shape and dtype are equal bit for bit."""
    bits = np.dtype(f"u{one.itemsize}")
    return bool(np.array_equal(np.ascontiguousarray(one).view(bits), np.ascontiguousarray(other).view(bits)))


def _off_scale(actual: np.ndarray, expected: np.ndarray) -> float | None:
    """Largest distance of an entry from the scaled reference, in units of its last place.

    Infinite if a channel that was not folded differs at all, or an entry is not finite. None for a vector.
    """
    if actual.ndim < 2 or not actual.size:
        return None
    a, b = (v.reshape(len(v), -1) for v in (actual, expected))
    rows = max(1, _AT_ONCE // a.shape[1])
    parts = [slice(start, start + rows) for start in range(0, len(a), rows)]
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):  # entries may not be finite
        factor = _factors(a, b)
        worst = np.max([_units(a[part], b[part], factor[part]) for part in parts])
    return np.inf if np.isnan(worst) else float(worst)


def _units(a: np.ndarray, b: np.ndarray, factor: np.ndarray) -> float:
    """Largest distance in units in the last place, of channels ``[rows, entries]`` with factors ``[rows, 1]``."""
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
    """Factor of each channel, float64 ``[rows, 1]``: the median of a few ratios, which a damaged entry does not move.

    Which entries are taken does not change the verdict: if no factor fits all entries, this one does not.
    """
    some = slice(None, None, max(1, a.shape[1] // _RATIOS))
    factor = _median_ratio(a[:, some], b[:, some])
    thin = (b[:, some] == 0).any(axis=1)  # a pruned channel: its nonzero entries may be elsewhere
    if thin.any():
        factor[thin] = _median_ratio(a[thin], b[thin])
    return factor


def _median_ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Median of a / b of each row, without entries where b is 0; 0 if there are no others."""
    known = b != 0
    ratios = np.divide(a, b, out=np.full(a.shape, np.inf), where=known, dtype=np.float64)
    ratios.sort(axis=1)  # entries left out sort last
    count = np.count_nonzero(known, axis=1)
    row = np.arange(len(a))
    median = (ratios[row, np.maximum(count - 1, 0) // 2] + ratios[row, np.minimum(count // 2, a.shape[1] - 1)]) / 2
    return np.where(count > 0, median, 0.0)[:, None]
