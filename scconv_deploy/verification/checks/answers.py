"""Accuracy on labelled data, and the inputs on which an artifact is farthest from the reference."""

from __future__ import annotations

import heapq

import numpy as np

from scconv_deploy.errors import UsageError
from scconv_deploy.records.accuracy import Accuracy
from scconv_deploy.records.parity import Check, WorstInput
from scconv_deploy.verification.accuracy import PairedMetric
from scconv_deploy.verification.metrics import looks_like_logits, relative_l2
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun

_KEPT_WORST = 5


class Answers:
    """Collector of an artifact's answers and worst inputs, sample by sample."""

    def __init__(self) -> None:
        self._paired = PairedMetric()
        self._worst: list[tuple[float, str, int]] = []

    def add(self, run: ReferenceRun, outputs: Arrays, rows: int | None) -> None:
        """Rank the inputs by their error, and compare answers with labels if there are any.

        Args:
            rows: number of rows that count; None for all.
        """
        ((first, given), *_) = run.given.items()
        if given.ndim and given.shape == outputs[first].shape and given.dtype.kind == "f":
            self._rank(run.sample, outputs[first], given, len(given) if rows is None else rows)
        self._paired.add(run.given, outputs, run.labels)

    def _rank(self, sample: str, y: np.ndarray, given: np.ndarray, rows: int) -> None:
        """Rank the rows of an output ``[N, ...]`` by their relative L2."""
        for index in range(min(rows, len(given))):
            entry = (relative_l2(y[index], given[index]), sample, index)
            if len(self._worst) < _KEPT_WORST:
                heapq.heappush(self._worst, entry)
            else:
                heapq.heappushpop(self._worst, entry)

    def merge(self, other: Answers) -> None:
        """Add the answers on later samples."""
        self._paired.merge(other._paired)
        self._worst = heapq.nlargest(_KEPT_WORST, [*self._worst, *other._worst])
        heapq.heapify(self._worst)

    @property
    def worst_inputs(self) -> tuple[WorstInput, ...]:
        ranked = sorted(self._worst, key=lambda entry: (-entry[0], entry[1:]))
        return tuple(WorstInput(sample, index, error) for error, sample, index in ranked)

    @property
    def accuracy(self) -> Accuracy | None:
        """The task's metric; None without labels or outputs that they fit."""
        return self._paired.with_examples()

    def checks(self) -> list[Check]:
        """Check that says why labelled data gave no accuracy; empty if they did."""
        if not self._paired.reason:
            return []
        return [Check("accuracy", "not run", f"the data have labels, but {self._paired.reason}: there is no accuracy")]


def check_labels(run: ReferenceRun) -> None:
    """Refuse a label outside the model's classes (UsageError); -1 stands for no label."""
    logits = next((g for g in run.given.values() if looks_like_logits(g)), None)
    if run.labels is not None and logits is not None:
        check_classes(run.labels, logits.shape[1], run.sample)


def check_classes(labels: np.ndarray, classes: int, sample: str) -> None:
    """Refuse a label (int64 ``[N]``) outside these classes (UsageError); -1 stands for no label. Targets were compared
    with the model's classes when they were opened."""
    if labels.dtype == object:
        return
    for row in np.flatnonzero((labels < -1) | (labels >= classes))[:1]:
        raise UsageError(
            f"Label {labels[row]} of row {row} in {sample} is outside 0 to {classes - 1}: the model has {classes} "
            "classes.",
            "Number the classes from 0 in the order of the model's outputs; -1 leaves a row out.",
        )
