"""Source of images with boxes, whatever file the annotations were in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from scconv_deploy.verification.data.blocks import Block, DataSource
from scconv_deploy.verification.data.images import EncodedImage, ImageInput, encoded
from scconv_deploy.verification.vision.box_metric import BoxMetric
from scconv_deploy.verification.vision.targets import Boxes, Placement, Task, labels_of


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """An image and its objects.

    Attributes:
        file: of the image, or its content.
        rows: class, left, top, right, bottom, crowd (1 or 0) of each object: float64 ``[M, 6]``.
        relative: whether corners are parts of the image, else pixels.
        annotated: False for an image without a label file.
    """

    file: Path | EncodedImage
    rows: np.ndarray
    relative: bool = False
    annotated: bool = True

    def target(self, placement: Placement, task: Task | None) -> Boxes:
        """The objects, in the pixels of the image."""
        corners = self.rows[:, 1:5] * (np.tile(placement.size, 2) if self.relative else 1.0)
        file = Path(self.file.name) if isinstance(self.file, EncodedImage) else self.file
        classes, crowd = self.rows[:, 0].astype(np.int64), self.rows[:, 5] > 0
        return Boxes(file, placement, corners, classes, crowd, BoxMetric, self.annotated, task)


def box_source(name: str, annotated: Sequence[AnnotatedImage], images: ImageInput, task: Task | None) -> DataSource:
    """Source of images in this order, one a block, with their objects as labels."""

    def blocks() -> Iterator[Block]:
        for one in annotated:
            values, placement = images.read(one.file, upright=True)
            yield Block({images.name: values[None]}, labels_of(one.target(placement, task)))

    def part(start: int, stop: int) -> DataSource:
        return box_source(name, annotated[start:stop], images, task)

    def carried() -> DataSource:
        return box_source(name, [replace(one, file=encoded(one.file)) for one in annotated], images, task)

    return DataSource(name, len(annotated), blocks, part, carried)
