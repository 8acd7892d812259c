"""mAP50-95 of two detectors on the same images, the interval of its difference, and where they differ most."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scconv_deploy.records.accuracy import Accuracy, ExampleBox, ExampleImage
from scconv_deploy.verification.vision.average_precision import Side, match
from scconv_deploy.verification.vision.bootstrap import METHOD, draws, images_needed, interval
from scconv_deploy.verification.vision.decoding import NO_BOXES, Detections, detections_in, overlaps
from scconv_deploy.verification.vision.targets import Boxes
from scconv_deploy.verification.vision.thumbnails import thumbnail

_SHOWN_SCORE, _SHOWN_BOXES, _SHOWN_IMAGES = 0.25, 20, 3
_WORTH_SHOWING = 0.01
"""Smallest disagreement of an image that is shown: a hundredth of a score."""


@dataclass(frozen=True, eq=False)
class _Example:
    target: Boxes
    reference: Detections
    artifact: Detections


class BoxMetric:
    """Paired mAP50-95. Kept are the matches of detections, not images."""

    def __init__(self) -> None:
        self._unlike = ""
        self._sides = Side(), Side()
        self._images = self._background = 0
        self._examples: list[tuple[float, int, _Example]] = []

    def add(self, reference: Mapping[str, np.ndarray], artifact: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
        """Count a batch.

        Args:
            reference, artifact: outputs by name.
            labels: a :class:`.targets.Boxes` a row; None leaves it out.
        """
        for row, target in enumerate(labels):
            if target is None:
                continue
            found = []
            for outputs in (reference, artifact):
                one = detections_in(outputs, row, target.task, target.placement.input_size)
                if one is None:
                    self._unlike = NO_BOXES
                    return
                found.append(Detections(target.placement.in_image(one.boxes), one.scores, one.classes))
            for side, detections in zip(self._sides, found, strict=True):
                side.add(match(self._images, detections, target.boxes, target.classes, target.crowd))
            self._keep(disagreement(*found), -self._images, _Example(target, *found))
            self._images += 1
            self._background += not target.annotated

    @property
    def reason(self) -> str:
        """Why there is no number; "" if there is one, or no image yet."""
        empty = self._images and not self._sides[0].objects
        return self._unlike or ("no image shows an object" if empty else "")

    def merge(self, other: BoxMetric) -> None:
        """Add what was counted on later images."""
        for side, more in zip(self._sides, other._sides, strict=True):
            side.merge(more, self._images)
        for apart, number, example in other._examples:
            self._keep(apart, number - self._images, example)
        self._images += other._images
        self._background += other._background
        self._unlike = other._unlike or self._unlike

    def _keep(self, apart: float, number: int, example: _Example) -> None:
        """Keep an example if it is one of the worst; ``number`` is minus the image's, so that the first one stays."""
        if apart >= _WORTH_SHOWING:
            heapq.heappush(self._examples, (apart, number, example))
            if len(self._examples) > _SHOWN_IMAGES:
                heapq.heappop(self._examples)

    def accuracy(self, confidence: float) -> Accuracy | None:
        """mAP of both, their difference (artifact - reference) and its interval; None without an object."""
        reference, artifact = self._sides
        if not reference.objects:
            return None
        drawn = draws(self._images)
        first, second = reference.precision(), artifact.precision()
        low, high = interval(artifact.resampled(drawn) - reference.resampled(drawn), confidence)
        return Accuracy(
            self._images, first, second, second - first, low, high, confidence,
            metric="mAP50-95", method=METHOD, background=self._background,
        )  # fmt: skip

    def rows_needed(self, found: Accuracy, drop: float) -> int | None:
        """Images at which the interval would hold no larger loss than ``drop``; None if no number does."""
        return images_needed(found.samples, found.difference, found.low, drop)

    def examples(self) -> tuple[ExampleImage, ...]:
        """Images on which the two differ most, the worst first, with the boxes of both."""
        return tuple(_shown(example) for *_, example in sorted(self._examples, key=lambda one: (-one[0], -one[1])))


def disagreement(one: Detections, other: Detections) -> float:
    """Sum over confident detections: of the score where the other has none of its class at an IoU of 0.5, else of the
    distance of scores and boxes."""
    first, second = map(_confident, (one, other))
    free = np.ones(len(second.scores), dtype=bool)
    apart = 0.0
    for box, score, kind in zip(first.boxes, first.scores, first.classes, strict=True):
        common = np.where(free & (second.classes == kind), overlaps(box, second.boxes), 0.0)
        best = int(common.argmax()) if len(common) else -1
        if best < 0 or common[best] < 0.5:
            apart += float(score)
            continue
        free[best] = False
        apart += abs(float(score - second.scores[best])) + 1 - float(common[best])
    return apart + float(second.scores[free].sum())


def _confident(found: Detections) -> Detections:
    """Detections worth showing: with a high score, and not wholly outside the image."""
    inside = (found.boxes[:, 2:] > found.boxes[:, :2]).all(axis=1)
    return found[inside & (found.scores >= _SHOWN_SCORE)]


def _shown(example: _Example) -> ExampleImage:
    target = example.target
    picture, scale = thumbnail(target.file)
    names = target.task.names if target.task is not None else {}

    def boxes(found: Detections) -> tuple[ExampleBox, ...]:
        confident = _confident(found)[:_SHOWN_BOXES]
        return tuple(
            ExampleBox(left, top, right, bottom, names.get(int(kind), str(kind)), round(float(score), 3))
            for (left, top, right, bottom), kind, score in zip(
                (confident.boxes * scale).round(1).tolist(), confident.classes, confident.scores, strict=True
            )
        )

    return ExampleImage(target.file.name, picture, boxes(example.reference), boxes(example.artifact))
