"""Accuracies of two classifiers on the same labelled inputs, and an interval for their difference.

The interval is Newcombe's, from Wilson's score intervals and the correlation of the pairs (method 10 of R. G. Newcombe,
"Improved confidence intervals for the difference between binomial proportions based on paired data", Statistics in
Medicine 17:2635-2650, 1998). It stays within [-1, 1], and its width is not 0 when all answers agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from scconv_deploy.records.parity import Accuracy

CONFIDENCE = 0.95
_MOST_ROWS = 2**30


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
