"""Non-maximum suppression as a PyTorch operator with the meaning of ONNX's NonMaxSuppression, without torchvision.

The exporter keeps the operator whole and writes ONNX's node for it, see :mod:`scconv_deploy.exporters.nms`.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("scconv_deploy::non_max_suppression", mutates_args=())
def non_max_suppression(
    boxes: Tensor, scores: Tensor, max_per_class: int, iou_threshold: float, score_threshold: float
) -> Tensor:
    """The boxes that survive, class by class.

    A class's boxes are visited from the highest score down (equal scores in their order); a box is kept when its
    score is above the threshold and its intersection over union with every box kept before is not. That is ONNX's
    NonMaxSuppression, but for its result: a mask has a fixed size, a list of indices has not.

    Args:
        boxes: ``[N, M, 4]``, two opposite corners each (x1, y1, x2, y2), float32 or float64.
        scores: ``[N, C, M]``, of boxes' type.
        max_per_class: how many boxes of an image's class are kept at most.
        iou_threshold: in [0, 1]; a box without area suppresses none and is suppressed by none.
        score_threshold: exclusive.

    Returns:
        ``[N, C, M]``, 1 where a box is kept and 0 elsewhere, of the scores' type.
    """
    kept = torch.zeros_like(scores)
    for image in range(scores.shape[0]):
        for label in range(scores.shape[1]):
            of_class = scores[image, label]
            order = of_class.argsort(descending=True, stable=True)
            order = order[of_class[order] > score_threshold]
            chosen = _greedy(overlaps(boxes[image, order]) > iou_threshold, max_per_class)
            kept[image, label, order[chosen]] = 1
    return kept


@non_max_suppression.register_fake
def _(boxes: Tensor, scores: Tensor, max_per_class: int, iou_threshold: float, score_threshold: float) -> Tensor:
    return torch.empty_like(scores)


def _greedy(suppresses: Tensor, limit: int) -> list[int]:
    """Indices kept of boxes in visiting order; ``suppresses[i, j]`` says that i, kept, removes j. Bool ``[K, K]``."""
    removed = torch.zeros(len(suppresses), dtype=torch.bool).numpy()
    rows = suppresses.cpu().numpy()
    kept: list[int] = []
    for index in range(len(rows)):
        if len(kept) == limit:
            break
        if not removed[index]:
            kept.append(index)
            removed |= rows[index]
    return kept


def overlaps(boxes: Tensor) -> Tensor:
    """Intersection over union of every pair, ``[K, 4]`` to ``[K, K]``; 0 where a box has no area."""
    low, high = torch.minimum(boxes[:, :2], boxes[:, 2:]), torch.maximum(boxes[:, :2], boxes[:, 2:])
    sides = (torch.minimum(high[:, None], high[None]) - torch.maximum(low[:, None], low[None])).clamp(min=0)
    area = (high - low).prod(1)
    intersection = sides.prod(2)
    union = area[:, None] + area[None] - intersection
    solid = (area[:, None] > 0) & (area[None] > 0) & (union > 0)
    return torch.where(solid, intersection / torch.where(solid, union, 1), 0)
