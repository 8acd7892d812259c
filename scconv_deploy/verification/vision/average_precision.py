"""Average precision of detections by pycocotools, and of resamples of the images.

pycocotools matches the detections of each image with its objects, and makes the number that is reported. Its own sums
are too slow for hundreds of resamples; :func:`resampled` makes the same sums from its matches, with an image counted as
often as it was drawn.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.verification.vision.decoding import Detections

_MOST_OF_A_CLASS = 100
"""Detections of a class in an image that count, as in COCO's own numbers."""
_ANY_SIZE = [0, 1e10]
_IMAGE = 1
_RECALLS = np.linspace(0.0, 1.0, 101)
_AT_ONCE = 2**22  # numbers of a resample's detections


@dataclass(frozen=True, eq=False)
class Matches:
    """Detections of one class in one image, and the objects that they were matched with.

    Attributes:
        image: number of the image.
        scores: float64 ``[D]``, the highest first.
        right: whether each is an object, at each IoU of 0.5, 0.55 ... 0.95: bool ``[10, D]``.
        ignored: whether it counts neither way (a crowd): bool ``[10, D]``.
        ignored_objects: whether each object counts neither way: bool ``[G]``.
    """

    image: int
    scores: np.ndarray
    right: np.ndarray
    ignored: np.ndarray
    ignored_objects: np.ndarray

    @property
    def objects(self) -> int:
        return int((~self.ignored_objects).sum())


def require_pycocotools() -> None:
    """Raise MissingRuntimeError if pycocotools is missing."""
    try:
        import pycocotools  # noqa: F401
    except ImportError as error:
        raise MissingRuntimeError("mAP needs pycocotools.", "pip install 'scconv-deploy[data]'") from error


def match(
    number: int, found: Detections, boxes: np.ndarray, classes: np.ndarray, crowd: np.ndarray
) -> dict[int, Matches]:
    """Match the detections in an image with its objects, class by class.

    Args:
        number: of the image.
        boxes: corners of the objects, float64 ``[M, 4]``, in the pixels of the detections'.
        classes, crowd: of the objects, ``[M]``.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    kinds = sorted({*map(int, found.classes), *map(int, classes)})
    if not kinds:
        return {}

    def described(places: np.ndarray, labels: np.ndarray, further: list[dict[str, Any]]) -> Any:
        sizes = places[:, 2:] - places[:, :2]
        one = COCO()
        one.dataset = {
            "images": [{"id": _IMAGE}],
            "categories": [{"id": kind} for kind in kinds],
            "annotations": [
                {"id": index + 1, "image_id": _IMAGE, "category_id": int(label), "bbox": [*place[:2], *size],
                 "area": float(size.prod()), "iscrowd": 0, **more}
                for index, (place, size, label, more) in enumerate(zip(places, sizes, labels, further, strict=True))
            ],
        }  # fmt: skip
        one.createIndex()
        return one

    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        judged = COCOeval(
            described(boxes, classes, [{"iscrowd": int(one)} for one in crowd]),
            described(found.boxes, found.classes, [{"score": float(score)} for score in found.scores]),
            "bbox",
        )
        _set(judged.params, kinds, [_IMAGE])
        judged.evaluate()
    return {
        kind: Matches(
            number, np.asarray(one["dtScores"], np.float64), one["dtMatches"] > 0, one["dtIgnore"].astype(bool),
            np.asarray(one["gtIgnore"]).astype(bool),
        )
        for kind, one in zip(kinds, judged.evalImgs, strict=True)
        if one is not None
    }  # fmt: skip


def _set(params: Any, kinds: list[int], images: list[int]) -> None:
    params.catIds, params.imgIds = kinds, images
    params.areaRng, params.areaRngLbl, params.maxDets = [_ANY_SIZE], ["all"], [_MOST_OF_A_CLASS]


class Side:
    """Matches of one side, the reference or the artifact, over all images."""

    def __init__(self) -> None:
        self._matches: defaultdict[int, list[Matches]] = defaultdict(list)

    def add(self, found: Mapping[int, Matches]) -> None:
        """Keep the matches of one image."""
        for kind, one in found.items():
            self._matches[kind].append(one)

    def merge(self, other: Side, after: int) -> None:
        """Add the matches of later images, which are numbered from ``after`` on."""
        for kind, ones in other._matches.items():
            self._matches[kind] += [replace(one, image=one.image + after) for one in ones]

    @property
    def objects(self) -> int:
        return sum(one.objects for ones in self._matches.values() for one in ones)

    def precision(self) -> float:
        """mAP50-95 by pycocotools: mean over IoUs, classes and recalls; NaN without objects."""
        from pycocotools.cocoeval import COCOeval

        judged = COCOeval(iouType="bbox")
        kinds = sorted(self._matches)
        images = sorted({one.image for ones in self._matches.values() for one in ones})
        _set(judged.params, kinds, images)
        judged._paramsEval = judged.params
        by_image = {(kind, one.image): one for kind in kinds for one in self._matches[kind]}
        judged.evalImgs = [_as_coco(by_image.get((kind, image))) for kind in kinds for image in images]
        with contextlib.redirect_stdout(io.StringIO()):
            judged.accumulate()
        known = judged.eval["precision"]
        known = known[known > -1]
        return float(known.mean()) if known.size else float("nan")

    def resampled(self, draws: np.ndarray) -> np.ndarray:
        """mAP50-95 of each resample, float64 ``[B]``; NaN where it has no object.

        Args:
            draws: how often each image is in it, int ``[B, images]``.
        """
        found = [_resampled(ones, draws) for _, ones in sorted(self._matches.items())]
        if not found:
            return np.full(len(draws), np.nan)
        values = np.stack(found)
        counts = np.isfinite(values).sum(axis=0)
        return np.divide(np.nansum(values, axis=0), counts, out=np.full(len(draws), np.nan), where=counts > 0)


def _as_coco(one: Matches | None) -> dict[str, Any] | None:
    if one is None:
        return None
    return {
        "dtScores": one.scores, "dtMatches": one.right, "dtIgnore": one.ignored, "gtIgnore": one.ignored_objects,
    }  # fmt: skip


def _resampled(matches: list[Matches], draws: np.ndarray) -> np.ndarray:
    """Average precision of one class in each resample, the mean over IoUs; NaN where it has no object."""
    objects = draws[:, [one.image for one in matches]] @ np.array([one.objects for one in matches])
    scores = np.concatenate([one.scores for one in matches])
    order = np.argsort(-scores, kind="stable")
    image = np.repeat([one.image for one in matches], [len(one.scores) for one in matches])[order]
    counted = ~np.concatenate([one.ignored for one in matches], axis=1)[:, order]
    right = np.concatenate([one.right for one in matches], axis=1)[:, order] & counted
    levels = [(np.flatnonzero(row), counts) for row, counts in zip(right, counted, strict=True)]
    found = np.full(len(draws), np.nan)
    known = np.flatnonzero(objects)
    for some in np.array_split(known, 1 + len(known) * len(image) // _AT_ONCE):
        times = np.take(draws[some], image, axis=1)  # an index would give columns in order, which add up slowly
        everything = times.cumsum(axis=1)
        found[some] = sum(
            _recalled(
                np.take(times, level, axis=1),
                np.take(everything if counts.all() else (times * counts).cumsum(axis=1), level, axis=1),
                objects[some, None],
            )
            for level, counts in levels
        ) / (len(levels) * len(_RECALLS))
    return found


def _recalled(times: np.ndarray, counted: np.ndarray, objects: np.ndarray) -> np.ndarray:
    """Sum of the precision at the recalls for one IoU, float64 ``[B]``.

    Precision is the best of any higher recall, and it is best where a detection is right: so those are enough.

    Args:
        times: how often each right detection counts, int ``[B, R]``, the highest score first.
        counted: how many detections count down to that one, ``[B, R]``.
        objects: how many there are, ``[B, 1]``.
    """
    hits = times.cumsum(axis=1)
    precision = hits / (counted + np.spacing(1))
    best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    reached = np.searchsorted(_RECALLS, hits / objects, side="right")
    return np.asarray((best * np.diff(reached, axis=1, prepend=0)).sum(axis=1))
