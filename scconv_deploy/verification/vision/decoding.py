"""Detections in a model's outputs, as boxes, scores and classes.

Known layouts: ``boxes [N, K, 4]``, ``scores [N, K]`` and ``labels [N, K]``; and an ultralytics model's ``output0``::

    [N, 4 + nc + more, A]    centre, width, height, a score per class (v8 and later; more: masks, keypoints)
    [N, A, 5 + nc + more]    the same with a score of the box before those of the classes (YOLOv5)
    [N, K, 6 + more]         corners, score, class: selected by the model itself (v10 and later)
    [N, K, 4 + nc]           centre, width, height in parts of the image, a score per class (RT-DETR)

The first two are filtered as ultralytics validates: every class above 0.001, suppression at an IoU of 0.7 within a
class, 300 at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scconv_deploy.verification.vision.targets import Task

_OUTPUT, _NAMES = "output0", ("boxes", "scores", "labels")
_LEAST_SCORE, _SAME_OBJECT, _MOST, _MOST_CANDIDATES = 0.001, 0.7, 300, 30000
NO_BOXES = (
    "no outputs are boxes, scores and labels, and there is no output0 as a detector of ultralytics with as many "
    "classes gives it"
)


@dataclass(frozen=True, eq=False)
class Detections:
    """Detections in one image, the best first.

    Attributes:
        boxes: corners in pixels, float64 ``[K, 4]``.
        scores: float64 ``[K]``.
        classes: int64 ``[K]``.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray

    @classmethod
    def of(cls, boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray) -> Detections:
        """Sort detections by score; those that are not finite are left out."""
        boxes, scores = boxes.astype(np.float64), scores.astype(np.float64)
        kept = np.flatnonzero(np.isfinite(boxes).all(axis=1) & np.isfinite(scores))
        order = kept[np.argsort(-scores[kept], kind="stable")]
        return cls(boxes[order], scores[order], classes[order].astype(np.int64))

    def __getitem__(self, rows: slice | np.ndarray) -> Detections:
        return Detections(self.boxes[rows], self.scores[rows], self.classes[rows])


def detections_in(
    outputs: Mapping[str, np.ndarray], row: int, task: Task | None, size: tuple[int, int]
) -> Detections | None:
    """Detections in one row of a model's outputs, in the input's pixels; None if the layout is unknown.

    Args:
        task: what an ultralytics checkpoint says; None for a model with named outputs.
        size: width and height of the input.
    """
    if task is None:
        return _named(outputs, row)
    output = outputs.get(_OUTPUT)
    if output is None or output.ndim != 3:
        return None
    found, classes, more = output[row].astype(np.float64), len(task.names), task.kind != "detect"
    if task.is_detr and found.shape[1] == 4 + classes:
        scores = found[:, 4:]
        return Detections.of(_corners(found[:, :4]) * np.tile(size, 2), scores.max(1), scores.argmax(1))
    if task.end_to_end and (found.shape[1] == 6 or (more and found.shape[1] > 6)):
        selected = found[found[:, 4] > _LEAST_SCORE]
        return Detections.of(selected[:, :4], selected[:, 4], selected[:, 5])
    if found.shape[0] == 4 + classes or (more and 4 + classes < found.shape[0] < found.shape[1]):
        return _suppressed(found[:4].T, found[4 : 4 + classes].T)
    if found.shape[1] == 5 + classes or (more and found.shape[1] > 5 + classes):
        return _suppressed(found[:, :4], found[:, 4:5] * found[:, 5 : 5 + classes])
    return None


def _named(outputs: Mapping[str, np.ndarray], row: int) -> Detections | None:
    if not all(name in outputs for name in _NAMES):
        return None
    boxes, scores, labels = (outputs[name] for name in _NAMES)
    if boxes.ndim != 3 or boxes.shape[2] != 4 or not scores.shape == labels.shape == boxes.shape[:2]:
        return None
    shown = scores[row] > 0  # a row that the model fills up has no score
    return Detections.of(boxes[row][shown], scores[row][shown], labels[row][shown])


def _corners(boxes: np.ndarray) -> np.ndarray:
    """Corners of boxes given as centre, width and height: ``[A, 4]`` both."""
    centre, half = boxes[:, :2], boxes[:, 2:] / 2
    return np.concatenate([centre - half, centre + half], axis=1)


def _suppressed(boxes: np.ndarray, scores: np.ndarray) -> Detections:
    """Best detections of ``[A, 4]`` boxes (centre, width, height) with ``[A, nc]`` scores, one an object and class."""
    rows, classes = np.nonzero(scores > _LEAST_SCORE)
    found = Detections.of(_corners(boxes[rows]), scores[rows, classes], classes)[:_MOST_CANDIDATES]
    of_class = {kind: np.flatnonzero(found.classes == kind) for kind in np.unique(found.classes)}
    kept: list[int] = []
    alive = np.ones(len(found.scores), dtype=bool)
    for best in range(len(alive)):
        if not alive[best]:
            continue
        kept.append(best)
        if len(kept) == _MOST:
            break
        others = of_class[found.classes[best]]
        others = others[others > best]
        alive[others[overlaps(found.boxes[best], found.boxes[others]) > _SAME_OBJECT]] = False
    return found[np.array(kept, dtype=np.int64)]


def overlaps(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of a box ``[4]`` with boxes ``[N, 4]``, all corners."""
    inner = np.clip(np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2]), 0, None).prod(axis=1)
    areas = np.clip(boxes[:, 2:] - boxes[:, :2], 0, None).prod(axis=1)
    union = areas + np.clip(box[2:] - box[:2], 0, None).prod() - inner
    return np.divide(inner, union, out=np.zeros_like(inner), where=union > 0)
