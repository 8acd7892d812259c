"""The task's metric of two models on the same labelled inputs, and an interval for their difference.

For classifiers the interval is Newcombe's, from Wilson's score intervals and the correlation of the pairs (method 10 of
R. G. Newcombe, "Improved confidence intervals for the difference between binomial proportions based on paired data",
Statistics in Medicine 17:2635-2650, 1998). It stays within [-1, 1], and its width is not 0 when all answers agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Protocol

import numpy as np

from scconv_deploy.records.accuracy import Accuracy
from scconv_deploy.verification.metrics import looks_like_logits

CONFIDENCE = 0.95
NO_LOGITS = "no output looks like logits (float [N, K], K of at least 2)"
_MOST_ROWS = 2**30
_Outputs = Mapping[str, np.ndarray]


class Metric(Protocol):
    """A task's metric of two models, the reference and the artifact, on the same inputs."""

    @property
    def reason(self) -> str:
        """Why labels could not be compared with the outputs; "" if they could."""
        ...

    def add(self, reference: _Outputs, artifact: _Outputs, labels: np.ndarray) -> None:
        """Count a batch of outputs by name and the labels of its rows."""
        ...

    def merge(self, other: Any) -> None:
        """Add what the same metric counted on later inputs."""
        ...

    def accuracy(self, confidence: float) -> Accuracy | None:
        """The metric of both, and the interval of the difference; None if nothing was counted."""
        ...

    def rows_needed(self, found: Accuracy, drop: float) -> int | None:
        """Rows at which the interval would hold no larger loss than ``drop``; None if no number does."""
        ...


class PairedMetric:
    """Metric of whatever task the labels are of: targets bring their own, class numbers are for logits."""

    def __init__(self) -> None:
        self._metric: Metric | None = None
        self._found: Accuracy | None = None

    def add(self, reference: _Outputs, artifact: _Outputs, labels: np.ndarray | None) -> None:
        """Count a batch.

        Args:
            reference, artifact: outputs by name.
            labels: of the rows, see :class:`.data.blocks.Block`; None for data without.
        """
        if labels is None:
            return
        if self._metric is None:
            targets = labels.tolist() if labels.dtype == object else []
            self._metric = next((target.metric() for target in targets if target is not None), None) or _TopOne()
        self._metric.add(reference, artifact, labels)
        self._found = None

    def merge(self, other: PairedMetric) -> None:
        """Add what was counted on later inputs of the same data."""
        if other._metric is None:
            return
        if self._metric is None:
            self._metric = other._metric
        else:
            self._metric.merge(other._metric)
        self._found = None

    @property
    def reason(self) -> str:
        """Why labelled data gave no number; "" if they did, or there are none."""
        return "" if self._metric is None else self._metric.reason

    def accuracy(self) -> Accuracy | None:
        """The metric of both, and the interval of the difference; None if nothing was counted."""
        if self._found is None and self._metric is not None:
            self._found = self._metric.accuracy(CONFIDENCE)
        return self._found

    def with_examples(self) -> Accuracy | None:
        """:meth:`accuracy` with the inputs on which the two differ most, where the metric keeps them."""
        found, examples = self.accuracy(), getattr(self._metric, "examples", None)
        return found if found is None or examples is None else replace(found, examples=examples())

    def rows_needed(self, drop: float) -> int | None:
        """See :meth:`Metric.rows_needed`."""
        found = self.accuracy()
        return None if found is None or self._metric is None else self._metric.rows_needed(found, drop)


class _TopOne:
    """Top-1 accuracy of the first output that looks like logits."""

    def __init__(self) -> None:
        self._counts, self.reason = PairedCounts(), ""

    def add(self, reference: _Outputs, artifact: _Outputs, labels: np.ndarray) -> None:
        logits = next((name for name, value in reference.items() if looks_like_logits(value)), None)
        if logits is None or len(labels) != len(reference[logits]):
            self.reason = NO_LOGITS if logits is None else f"{logits} has another length than the labels"
        elif reference[logits].shape != artifact[logits].shape:
            self.reason = f"{logits} has another shape in the artifact"
        else:
            self._counts.add(reference[logits], artifact[logits], labels)

    def merge(self, other: _TopOne) -> None:
        self._counts.merge(other._counts)
        self.reason = other.reason or self.reason

    def accuracy(self, confidence: float) -> Accuracy | None:
        return self._counts.accuracy(confidence)

    def rows_needed(self, found: Accuracy, drop: float) -> int | None:
        return self._counts.rows_needed(drop, found.confidence)


@dataclass
class PairedCounts:
    """Counts of right and wrong answers of the reference and the artifact on the same inputs."""

    both_right: int = 0
    reference_only: int = 0
    artifact_only: int = 0
    both_wrong: int = 0

    @property
    def samples(self) -> int:
        return self.both_right + self.reference_only + self.artifact_only + self.both_wrong

    def add(self, reference: np.ndarray, artifact: np.ndarray, labels: np.ndarray) -> None:
        """Count a batch.

        Args:
            reference, artifact: logits ``[N, K]``.
            labels: int ``[N]``; rows with a negative label are left out.
        """
        known = labels >= 0
        a, b = (np.argmax(logits[known], axis=1) == labels[known] for logits in (reference, artifact))
        self.both_right += int(np.sum(a & b))
        self.reference_only += int(np.sum(a & ~b))
        self.artifact_only += int(np.sum(~a & b))
        self.both_wrong += int(np.sum(~a & ~b))

    def merge(self, other: PairedCounts) -> None:
        """Add the counts of other inputs."""
        self.both_right += other.both_right
        self.reference_only += other.reference_only
        self.artifact_only += other.artifact_only
        self.both_wrong += other.both_wrong

    def accuracy(self, confidence: float = CONFIDENCE) -> Accuracy | None:
        """Accuracies, their difference (artifact - reference) and its interval; None without samples."""
        n = self.samples
        if not n:
            return None
        reference = (self.both_right + self.reference_only) / n
        artifact = (self.both_right + self.artifact_only) / n
        low, high = self._interval(confidence)
        return Accuracy(n, reference, artifact, artifact - reference, low, high, confidence)

    def rows_needed(self, drop: float, confidence: float = CONFIDENCE) -> int | None:
        """Rows of which the interval, with the shares of these, holds no larger loss than ``drop``; None if none do."""
        return _fewest(self.samples, lambda times: -self._interval(confidence, times)[0] <= drop)

    def _interval(self, confidence: float, times: float = 1.0) -> tuple[float, float]:
        """The interval; of so many times these rows."""
        a, b, c, d = (
            times * count for count in (self.both_right, self.artifact_only, self.reference_only, self.both_wrong)
        )
        n = a + b + c + d
        first, second = (a + b) / n, (a + c) / n
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        first_low, first_high = _wilson(a + b, n, z)
        second_low, second_high = _wilson(a + c, n, z)
        phi = _correlation(a, b, c, d)

        def spread(u: float, v: float) -> float:
            return math.sqrt(max(u * u - 2 * phi * u * v + v * v, 0.0))

        difference = first - second
        low = difference - spread(first - first_low, second_high - second)
        high = difference + spread(first_high - first, second - second_low)
        return max(low, -1.0), min(high, 1.0)


@dataclass(frozen=True)
class ChangedAnswers:
    """Counts of rows whose answer changed."""

    changed: int = 0
    rows: int = 0

    def __add__(self, other: ChangedAnswers) -> ChangedAnswers:
        return ChangedAnswers(self.changed + other.changed, self.rows + other.rows)

    @property
    def share(self) -> float:
        return self.changed / self.rows

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Wilson's score interval of the share."""
        return _wilson(self.changed, self.rows, NormalDist().inv_cdf((1 + confidence) / 2))

    def rows_needed(self, share: float, confidence: float = CONFIDENCE) -> int | None:
        """Rows of which the interval, with the same share, holds no larger one; None if none do."""
        z = NormalDist().inv_cdf((1 + confidence) / 2)
        return _fewest(self.rows, lambda times: _wilson(times * self.changed, times * self.rows, z)[1] <= share)


def _fewest(rows: int, enough: Callable[[float], bool]) -> int | None:
    """Fewest rows that are enough, at least these; None if 2^30 are not. More than enough are enough."""
    if not rows or not enough(_MOST_ROWS / rows):
        return None
    low, high = rows, _MOST_ROWS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle / rows) else (middle + 1, high)
    return low


def _correlation(a: float, b: float, c: float, d: float) -> float:
    """Phi coefficient of the pairs, with Newcombe's continuity correction where it is positive."""
    n = a + b + c + d
    product = (a + b) * (c + d) * (a + c) * (b + d)
    if not product:
        return 0.0
    excess = a * d - b * c
    return (max(excess - n / 2, 0) if excess > 0 else excess) / math.sqrt(product)


def _wilson(successes: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's score interval (E. B. Wilson, JASA 22:209-212, 1927)."""
    p = successes / n
    centre = p + z * z / (2 * n)
    width = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return (centre - width) / scale, (centre + width) / scale
