"""The static link of the weights: each stored one is the reference's, or it with a BatchNorm folded in.

The only catch for a low bit of one weight: no input shows it above the rounding of the sums that it is part of.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
from onnx import numpy_helper

from scconv_deploy.precision.types import NUMPY
from scconv_deploy.report.records import Check, Quantity
from scconv_deploy.verification.reference_run import Arrays

NAME = "weights"


def check(model: onnx.ModelProto, weights: Arrays, limit_ulps: float) -> Check:
    """Compare the initializers that have the name and the shape of a weight of the reference.

    A weight of two or more axes may be scaled by one factor for each output channel (axis 0), which is what folding a
    BatchNorm does; the factor itself is not judged here, for it shows in every output of the channel.

    One of a single axis (a bias, a BatchNorm's) is the reference's bit for bit, unless the weight beside it was folded.
    A weight in half is compared with the reference's rounded to half.

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
        if expected is None or expected.dtype != np.float32:
            continue
        actual = numpy_helper.to_array(tensor)
        stored_as = expected
        if actual.dtype in NUMPY.values():
            with np.errstate(over="ignore"):  # what half cannot hold differs then
                stored_as = expected.astype(actual.dtype)
            rounded = f", rounded to {actual.dtype}"
        if actual.shape != expected.shape or actual.dtype != stored_as.dtype:
            others.append(tensor.name)
        elif actual.tobytes() == stored_as.tobytes():
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
    return Check(NAME, "passed", text + (f"; {len(others)} of another form" if others else ""), decided)


def _must_be_equal(name: str, stored: Mapping[str, onnx.TensorProto], weights: Arrays) -> bool:
    """Whether nothing can have been folded into a vector: its module's weight is a vector too, or as it was."""
    weight = f"{name.rpartition('.')[0]}.weight"
    if weight not in stored or weight not in weights:
        return False
    actual, expected = numpy_helper.to_array(stored[weight]), weights[weight]
    with np.errstate(over="ignore"):
        return expected.ndim == 1 or actual.tobytes() == expected.astype(actual.dtype).tobytes()


def _off_scale(actual: np.ndarray, expected: np.ndarray) -> float | None:
    """The largest distance of an entry from the scaled reference; None where no comparison makes sense.

    The factor of a channel is the median of its entries' ratios, so that a damaged entry does not move it.
    """
    if actual.ndim < 2 or not np.isfinite(expected).all():
        return None
    kind = ml_dtypes.finfo(actual.dtype)
    a, b = (v.reshape(len(v), -1).astype(np.float64) for v in (actual, expected))
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a channel of zeros has no ratio
        factor = np.nan_to_num(np.nanmedian(np.where(b == 0, np.nan, a / b), axis=1, keepdims=True))
    scaled = factor * b
    off = np.abs(a - scaled)
    units = off / (float(kind.eps) * np.maximum(np.abs(scaled), float(kind.tiny)))
    if actual.dtype == np.float32:  # rounding to half makes other factors look like 1
        with np.errstate(invalid="ignore"):
            units[factor[:, 0] == 1] *= np.inf  # not folded at all: every bit counts
    return float(np.nanmax(units))  # 0 * inf: the entries of such a channel that are equal
