"""Mean intersection over union of two semantic segmenters on the same images, and the interval of its difference."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from scconv_deploy.errors import UsageError
from scconv_deploy.records.accuracy import Accuracy
from scconv_deploy.verification.vision.bootstrap import METHOD, draws, images_needed, interval
from scconv_deploy.verification.vision.targets import Mask

NO_MASKS = "no output holds a score for each class and pixel (float [N, K, H, W], K of at least 2)"


class MaskMetric:
    """Paired mIoU. Kept are counts for each image and class: pixels of the intersection and of the union."""

    def __init__(self) -> None:
        self.reason = ""
        self._counts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(self, reference: Mapping[str, np.ndarray], artifact: Mapping[str, np.ndarray], labels: np.ndarray) -> None:
        """Count a batch.

        Args:
            reference, artifact: outputs by name.
            labels: a :class:`.targets.Mask` a row; None leaves it out.

        Raises:
            UsageError: a mask holds a class that the model has not.
        """
        name = next((name for name, value in reference.items() if _looks_like_scores(value)), None)
        if name is None or reference[name].shape != artifact[name].shape:
            self.reason = NO_MASKS if name is None else f"{name} has another shape in the artifact"
            return
        for row, target in enumerate(labels):
            if target is not None:
                truth = _sized(target, reference[name].shape[1:])
                for counts, outputs in zip(self._counts, (reference, artifact), strict=True):
                    counts.append(_overlap(outputs[name][row], truth))

    def merge(self, other: MaskMetric) -> None:
        """Add what was counted on later images."""
        for counts, more in zip(self._counts, other._counts, strict=True):
            counts += more
        self.reason = other.reason or self.reason

    def accuracy(self, confidence: float) -> Accuracy | None:
        """mIoU of both over the classes that occur, and the interval of the difference; None without images."""
        if not self._counts[0]:
            return None
        reference, artifact = (np.stack(counts).astype(np.float64) for counts in self._counts)
        images = len(reference)
        once = np.ones((1, images), dtype=np.int64)
        first, second = (float(_mean(side, once)[0]) for side in (reference, artifact))
        if np.isnan(first):
            return None
        drawn = draws(images)
        low, high = interval(_mean(artifact, drawn) - _mean(reference, drawn), confidence)
        return Accuracy(images, first, second, second - first, low, high, confidence, metric="mIoU", method=METHOD)

    def rows_needed(self, found: Accuracy, drop: float) -> int | None:
        """Images at which the interval would hold no larger loss than ``drop``; None if no number does."""
        return images_needed(found.samples, found.difference, found.low, drop)


def _looks_like_scores(output: np.ndarray) -> bool:
    return output.ndim == 4 and output.shape[1] >= 2 and output.dtype.kind == "f"


def _sized(target: Mask, shape: tuple[int, ...]) -> np.ndarray:
    """Classes at the size of the output, each pixel's the nearest one's."""
    kinds, *sizes = shape
    if target.classes.max(initial=-1) >= kinds:
        raise UsageError(
            f"{target.file} holds class {target.classes.max()}; the model has {kinds} classes, 0 to {kinds - 1}.",
            "Number the classes as the model does; 255 leaves a pixel out.",
        )
    rows, columns = (
        (np.arange(size) * own + own // 2) // size for size, own in zip(sizes, target.classes.shape, strict=True)
    )
    return target.classes[rows][:, columns]


def _overlap(scores: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Pixels of the intersection and of the union by class: int64 ``[K, 2]``."""
    known = truth >= 0
    kinds = len(scores)
    answer, right = scores.argmax(axis=0)[known], truth[known]
    inner = np.bincount(right[answer == right], minlength=kinds)
    union = np.bincount(answer, minlength=kinds) + np.bincount(right, minlength=kinds) - inner
    return np.stack([inner, union], axis=1)


def _mean(counts: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """mIoU of each resample: float64 ``[B]``, NaN where no class occurs.

    Args:
        counts: float64 ``[images, K, 2]``.
        draws: how often each image is in a resample, ``[B, images]``.
    """
    inner, union = np.moveaxis(np.tensordot(draws, counts, axes=1), 2, 0)
    occurs = union > 0
    ratios = np.divide(inner, union, out=np.zeros_like(inner), where=occurs).sum(axis=1)
    kinds = occurs.sum(axis=1)
    return np.divide(ratios, kinds, out=np.full(len(draws), np.nan), where=kinds > 0)
