"""Static check of int8 weights whose place in the reference is not known: they are float weights, rounded.

Without that place nothing says which BatchNorms were folded in. But a folded one multiplies an output channel by one
factor, and a code is the nearest one: every weight then lies within half a step of its code, times that factor.
"""

from __future__ import annotations

import numpy as np

from scconv_deploy.graph.quantization import Quantization, float_name
from scconv_deploy.graph.stored_weights import StoredWeights
from scconv_deploy.precision.calibration import rounded_scales, weight_scales
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.records.tolerances import Table
from scconv_deploy.verification.checks import quantizers
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck
from scconv_deploy.verification.checks.quantizers import first_of
from scconv_deploy.verification.reference.run import Arrays, ReferenceSource

_ROUNDING = 2.0**-18
"""Slack of the borders between codes, relative to the weight: roundings of a folding, a quotient and a product."""
_LAST = 127


class StoredCodes(ArtifactCheck):
    """Codes of a file's weights against the reference's float weights.

    Args:
        found: quantisers of the file.
        source: reference with float weights, of PyTorch or of the float file.
    """

    def __init__(self, found: Quantization, source: ReferenceSource, limits: Table) -> None:
        self._found, self._source, self._limits = found, source, limits
        self._own = found.record is not None and bool(source.swapped_link)  # made from this float file, with our rule

    def checks(self) -> list[Check]:
        weights, stored = self._source.weights, {one.name: one for one in self._found.stored}
        same = scaled = wrong = 0
        problems: list[str] = []
        others: list[str] = []
        for one in stored.values():
            expected = self._expected(one, weights)
            fits = [_fit(one, w) for w in expected]
            exact, factor = max(fits, key=lambda fit: (fit[0].mean(), fit[1].mean()), default=(None, None))
            if exact is None or factor is None:
                others.append(one.name)
            elif self._own and exact.all() and not any(_scales_are_ours(one, w) for w in expected):
                wrong += 1
                problems.append(f"scales of {one.name} are not those of the float weights' largest magnitudes")
            elif exact.all():
                same += 1
            elif factor.all():
                scaled += 1
            elif self._own or 2 * factor.sum() > factor.size:
                wrong += int((~factor).sum())
                problems.append(
                    f"{one.name} is not the reference's weight in {(~factor).sum()} of {factor.size} channels"
                )
            else:  # folded or equalised otherwise
                others.append(one.name)
        quantity = Quantity("unexplained_flips", wrong, self._limits["unexplained_flips"].value)
        if problems:
            return [Check(quantizers.WEIGHTS, "failed", f"int8 weights: {first_of(problems)}", (quantity,))]
        left = f"; not compared, under another name or changed: {first_of(others)}" if others else ""
        if not same and not scaled:
            why = f"no int8 weight can be compared with the reference's{left}"
            return [Check(quantizers.WEIGHTS, "not run", why)] if stored else []
        folded = f", {scaled} but for a factor of each channel" if scaled else ""
        text = f"int8 weights of {same + scaled} layers are the reference's, rounded to their scales{folded}"
        return [Check(quantizers.WEIGHTS, "passed", f"{text}{left}", (quantity,))]

    def _expected(self, one: StoredWeights, weights: Arrays) -> list[np.ndarray]:
        """Float weights of the same name; where the file has other names, those that fit, if they are of one name."""
        if float_name(one.name) in weights:
            return _as_codes(weights[float_name(one.name)], one)
        fitting = {}
        for name, value in weights.items():
            if found := [w for w in _as_codes(value, one) if _fit(one, w)[1].all()]:
                fitting[name] = found
        return next(iter(fitting.values())) if len(fitting) == 1 else []


def _as_codes(value: np.ndarray, one: StoredWeights) -> list[np.ndarray]:
    """A float weight in the shape of codes, output channels first in either sense, and as the file's type rounds it."""
    if value.dtype.kind not in "fV" or value.size != one.codes.size or value.ndim < 2:
        return []
    value = value.astype(np.float32)
    turned = [value, value.T] if value.ndim == 2 else [value]
    found = [w.reshape(one.codes.shape) for w in turned if len(w) == len(one.codes)]
    kind = np.dtype(one.data)
    return found if kind == np.float32 else [*found, *(w.astype(kind).astype(np.float32) for w in found)]


def _fit(one: StoredWeights, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each channel's codes are those of its weights, and whether they are so but for a factor, bool ``[C]``."""
    codes = one.codes.reshape(len(one.codes), -1).astype(np.float64)
    w = weight.reshape(len(weight), -1).astype(np.float64)
    scales = np.broadcast_to(one.scales.astype(np.float64).reshape(-1, 1), (len(codes), 1))
    slack = _ROUNDING * np.abs(codes * scales)
    low = np.where(codes <= -_LAST, -np.inf, (codes - 0.5) * scales - slack)
    high = np.where(codes >= _LAST, np.inf, (codes + 0.5) * scales + slack)
    exact = ((low <= w) & (w <= high)).all(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        ends = np.stack([low / w, high / w])
    known = w != 0
    least = np.where(known, ends.min(axis=0), -np.inf).max(axis=1)
    most = np.where(known, ends.max(axis=0), np.inf).min(axis=1)
    zeros = np.where(known, 0, codes).any(axis=1)
    return np.asarray(exact), np.asarray((least <= most) & ~zeros)


def _scales_are_ours(one: StoredWeights, weight: np.ndarray) -> bool:
    expected = rounded_scales(weight_scales(weight), np.dtype(one.data))
    return len(expected) == len(one.scales) and expected.tobytes() == one.scales.tobytes()
