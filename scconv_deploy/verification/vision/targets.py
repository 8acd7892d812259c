"""What an image shows, as its annotations say it, and what a model says of its own answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Task:
    """What an ultralytics checkpoint, or the metadata of its ONNX file, says of the model's answers.

    Attributes:
        kind: ``detect``, ``segment``, ``pose``, ``obb`` or ``classify``.
        names: class number -> name.
        end_to_end: whether the model selects detections itself (rows of corners, score and class).
        head: class name of the last layer.
    """

    kind: str
    names: Mapping[int, str] = field(default_factory=dict)
    end_to_end: bool = False
    head: str = ""

    @property
    def is_detr(self) -> bool:
        """Whether boxes are parts of the image and need no suppression."""
        return "detr" in self.head.lower()

    @property
    def named(self) -> bool:
        """Whether the names say more than the numbers: ``class0`` or ``0`` is no name."""
        return any(name not in (str(n), f"class{n}") for n, name in self.names.items())


@dataclass(frozen=True)
class Placement:
    """Where an image lies in the model's input: ``input = image * scale + offset``, in pixels, x before y.

    Attributes:
        size: width and height of the image.
        input_size: width and height of the input.
    """

    size: tuple[int, int]
    input_size: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[int, int]

    def in_image(self, boxes: np.ndarray) -> np.ndarray:
        """Boxes (corners, ``[N, 4]``) in the image's pixels, cut at its edges."""
        moved = (boxes - np.tile(self.offset, 2)) / np.tile(self.scale, 2)
        return np.clip(moved, 0, np.tile(self.size, 2))


@dataclass(frozen=True, eq=False)
class Boxes:
    """Objects in an image.

    Attributes:
        file: of the image.
        boxes: corners in the image's pixels, float64 ``[M, 4]``.
        classes: class numbers as the model gives them, int64 ``[M]``.
        crowd: whether a box stands for many objects, which then count neither way; bool ``[M]``.
        metric: makes a metric for such targets (:class:`.accuracy.Metric`).
        annotated: False for an image without a label file, which is background.
        task: what the checkpoint says; None for a model with outputs ``boxes``, ``scores`` and ``labels``.
    """

    file: Path
    placement: Placement
    boxes: np.ndarray
    classes: np.ndarray
    crowd: np.ndarray
    metric: Callable[[], Any]
    annotated: bool = True
    task: Task | None = None


@dataclass(frozen=True, eq=False)
class Mask:
    """Class of each pixel of the model's input.

    Attributes:
        file: name of its file.
        classes: int64 ``[H, W]``, -1 for a pixel that does not count.
        metric: makes a metric for such targets (:class:`.accuracy.Metric`).
    """

    file: str
    classes: np.ndarray
    metric: Callable[[], Any]


def labels_of(target: Boxes | Mask) -> np.ndarray:
    """One target as the labels of a block of one row: an object array ``[1]``."""
    found = np.empty(1, dtype=object)
    found[0] = target
    return found
