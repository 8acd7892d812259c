"""Data sets of semantic segmentation: ``masks/`` beside ``images/``, a mask of the same name for each image.

A mask is an image of one channel (grey or with a palette): a pixel's value is its class, 255 leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.verification.data.blocks import Block, DataSource
from scconv_deploy.verification.data.images import (
    EncodedImage,
    ImageInput,
    encoded,
    images_in,
    known_suffixes,
    opened_content,
)
from scconv_deploy.verification.vision.mask_metric import MaskMetric
from scconv_deploy.verification.vision.targets import Mask, labels_of

IMAGES, MASKS = "images", "masks"
_IGNORED = 255


def mask_source(folder: Path, images: ImageInput) -> DataSource:
    """Open a folder with ``images/`` and ``masks/``; masks go through what happens to the images.

    Raises:
        UsageError: there is no image, or an image without a mask.
    """
    files = images_in(folder / IMAGES)
    if not files:
        raise UsageError(f"--data {folder}: no image in {IMAGES}/.", known_suffixes())
    masks = [(folder / MASKS / file.relative_to(folder / IMAGES)).with_suffix(".png") for file in files]
    missing = [mask for mask in masks if not mask.is_file()]
    if missing:
        raise UsageError(
            f"--data {folder}: {len(missing)} of {len(masks)} masks are missing, the first is {missing[0]}.",
            "Put a mask of the same name there for each image, or take the image out.",
        )

    return _source(folder.name, list(zip(files, masks, strict=True)), images)


def _source(
    name: str, pairs: Sequence[tuple[Path | EncodedImage, Path | EncodedImage]], images: ImageInput
) -> DataSource:
    """Source of pairs of an image and its mask in this order, one a block."""

    def blocks() -> Iterator[Block]:
        for file, mask in pairs:
            values, placement = images.read(file, upright=True)
            target = Mask(str(mask), _placed(_read(mask, placement.size), images), MaskMetric)
            yield Block({images.name: values[None]}, labels_of(target))

    def part(start: int, stop: int) -> DataSource:
        return _source(name, pairs[start:stop], images)

    def carried() -> DataSource:
        return _source(name, [(encoded(file), encoded(mask)) for file, mask in pairs], images)

    return DataSource(name, len(pairs), blocks, part, carried)


def _read(file: Path | EncodedImage, size: tuple[int, int]) -> np.ndarray:
    """A mask as int64 ``[H, W]``, -1 where a pixel does not count."""
    from PIL import Image

    try:
        with Image.open(opened_content(file)) as opened:
            found = np.asarray(opened).astype(np.int64)
    except Exception as error:  # each reader of Pillow has its own exceptions
        raise IntegrityError(f"{file} is damaged or not an image.", "Write the mask again.") from error
    if found.shape != size[::-1]:
        raise IntegrityError(
            f"{file} is {'x'.join(map(str, found.shape))}, expected height x width of its image, "
            f"{size[1]}x{size[0]}, in one channel.",
            "Write the class numbers as a grey PNG.",
        )
    return np.where(found == _IGNORED, -1, found)


def _placed(mask: np.ndarray, images: ImageInput) -> np.ndarray:
    """A mask at the place of its image in the input, each pixel the nearest; a letterbox's border does not count."""
    placement, _ = images.place((mask.shape[1], mask.shape[0]))
    places = []
    for axis in (1, 0):
        inside = (np.arange(placement.input_size[axis]) + 0.5 - placement.offset[axis]) / placement.scale[axis]
        places.append(np.floor(inside).astype(np.int64))
    rows, columns = places
    known = ((rows >= 0) & (rows < mask.shape[0]))[:, None] & ((columns >= 0) & (columns < mask.shape[1]))[None]
    found = mask[np.clip(rows, 0, mask.shape[0] - 1)][:, np.clip(columns, 0, mask.shape[1] - 1)]
    return np.where(known, found, -1)
