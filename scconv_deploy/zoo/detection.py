"""Postprocessing of a one-stage detector: anchors, box decoding, and the choice of the final boxes.

Boxes are ``(x1, y1, x2, y2)`` in pixels of the input image. Every shape here is fixed by the image's size and the
options, so that the exported graph has fixed outputs: detections are padded and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scconv_deploy.errors import ConfigurationError
from scconv_deploy.zoo.nms import non_max_suppression

LARGEST_LOG_SCALE = math.log(1000 / 16)
"""Limit of the decoded log width and height, so that exp cannot overflow (Detectron's)."""


@dataclass(frozen=True)
class DetectionOptions:
    """Settings for the choice of the final boxes; the defaults are RetinaNet's (Lin et al. 2017, section 4.1).

    Attributes:
        score_threshold: scores up to this are dropped, in [0, 1).
        iou_threshold: a box that overlaps a better one of its class by more is dropped.
        candidates_per_level: the best scores of each feature map that are decoded.
        max_detections: K, of one image (100 as in COCO's evaluation).

    Raises:
        ConfigurationError: an option out of its range.
    """

    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    candidates_per_level: int = 1000
    max_detections: int = 100

    def __post_init__(self) -> None:
        if not 0 <= self.score_threshold < 1:
            raise ConfigurationError(
                f"Detection: score_threshold is {self.score_threshold}, expected 0 <= t < 1.", "Use 0.05, the default."
            )
        if not 0 <= self.iou_threshold <= 1:
            raise ConfigurationError(
                f"Detection: iou_threshold is {self.iou_threshold}, expected 0 to 1.", "Use 0.5, the default."
            )
        if self.candidates_per_level < 1 or self.max_detections < 1:
            raise ConfigurationError(
                f"Detection: candidates_per_level {self.candidates_per_level} and max_detections "
                f"{self.max_detections} must both be at least 1.",
                "Use 1000 and 100, the defaults.",
            )


def anchor_shapes(size: float, ratios: Sequence[float], scales: Sequence[float]) -> Tensor:
    """Anchors around the origin, of area ``(size * scale)**2`` and height / width of each ratio.

    Returns:
        ``[len(ratios) * len(scales), 4]``, float32, a ratio's scales side by side.
    """
    shapes = []
    for ratio in ratios:
        for scale in scales:
            width, height = size * scale / math.sqrt(ratio), size * scale * math.sqrt(ratio)
            shapes.append((-width / 2, -height / 2, width / 2, height / 2))
    return torch.tensor(shapes)


def grid_anchors(shapes: Tensor, height: int, width: int, stride: int) -> Tensor:
    """The anchors ``[A, 4]`` around every place of a feature map, its first place at the image's corner.

    Returns:
        ``[height * width * A, 4]``, row by row, of the shapes' type.
    """
    y = torch.arange(height, dtype=shapes.dtype, device=shapes.device) * stride
    x = torch.arange(width, dtype=shapes.dtype, device=shapes.device) * stride
    centers = torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)
    return (centers.repeat(1, 2)[:, None] + shapes).reshape(-1, 4)


def decode(anchors: Tensor, deltas: Tensor, height: int, width: int) -> Tensor:
    """Boxes from anchors and predicted deltas (Girshick et al. 2014, appendix C), cut at the image's edges.

    Args:
        anchors: ``[..., 4]``.
        deltas: ``[..., 4]``: shift of the centre in widths and heights, logarithm of the scale of width and height.
        height, width: of the image.

    Returns:
        ``[..., 4]``.
    """
    low, high = anchors[..., :2], anchors[..., 2:]
    size = high - low
    center = (low + high) / 2 + deltas[..., :2] * size
    half = torch.exp(deltas[..., 2:].clamp(max=LARGEST_LOG_SCALE)) * size / 2
    x1, y1 = (center - half).unbind(-1)
    x2, y2 = (center + half).unbind(-1)
    return torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], dim=-1)


def candidates(logits: Tensor, deltas: Tensor, anchors: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best (anchor, class) pairs of one feature map; an anchor may come with several classes.

    They are chosen by their logits: large ones have a sigmoid of exactly 1, which would make ties.

    Args:
        logits: ``[N, A, C]``.
        deltas: ``[N, A, 4]``.
        anchors: ``[A, 4]``.
        count: how many; all, where there are fewer.

    Returns:
        logits ``[N, M]``, labels int64 ``[N, M]``, and deltas beside anchors ``[N, M, 8]``.
    """
    classes = logits.shape[2]
    best, index = logits.flatten(1).topk(min(count, logits.shape[1] * classes))
    anchor = index // classes
    chosen = deltas.gather(1, anchor[..., None].expand(-1, -1, 4))
    return best, index % classes, torch.cat([chosen, anchors[anchor]], dim=2)


def detect(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    image_size: tuple[int, int],
    options: DetectionOptions,
) -> dict[str, Tensor]:
    """The final boxes of each image, best first.

    Args:
        logits, deltas, anchors: of every feature map, ``[N, A, C]``, ``[N, A, 4]`` and ``[A, 4]``.
        image_size: height and width, in pixels.

    Returns:
        ``boxes`` ``[N, K, 4]``, ``scores`` ``[N, K]``, ``labels`` int64 ``[N, K]`` and ``count`` int64 ``[N]``. Rows
        from count on are padding: box and score 0, label -1. K is ``max_detections``, or the number of candidates
        where an image has fewer.
    """
    levels = zip(logits, deltas, anchors, strict=True)
    found = [candidates(*level, options.candidates_per_level) for level in levels]
    scores = torch.cat([level[0] for level in found], dim=1).sigmoid()
    labels = torch.cat([level[1] for level in found], dim=1)
    encoded = torch.cat([level[2] for level in found], dim=1)
    boxes = decode(encoded[..., 4:], encoded[..., :4], *image_size)

    classes = torch.arange(logits[0].shape[2], device=labels.device)
    by_class = torch.where(labels[:, None] == classes[:, None], scores[:, None], 0)
    # more than max_detections of one class cannot be among the best max_detections of all
    kept = non_max_suppression(
        boxes, by_class, options.max_detections, options.iou_threshold, options.score_threshold
    )  # fmt: skip
    best, index = (by_class * kept).amax(1).topk(min(options.max_detections, scores.shape[1]))
    detected = best > 0
    return {
        "boxes": boxes.gather(1, index[..., None].expand(-1, -1, 4)) * detected[..., None],
        "scores": best,
        "labels": torch.where(detected, labels.gather(1, index), -1),
        "count": detected.sum(1),
    }
