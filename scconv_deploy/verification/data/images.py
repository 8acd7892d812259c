"""Image files as a model's input: resized, cropped or letterboxed, scaled to [0, 1] and normalised."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from scconv_deploy.errors import IntegrityError, MissingRuntimeError, UsageError
from scconv_deploy.verification.vision.targets import Placement, Task

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
Affine = tuple[tuple[float, ...], tuple[float, ...], int | None]
"""Preprocessing: mean and standard deviation per channel, and the shorter side in pixels before a centre crop."""
_GREY = 114
"""Value of a letterbox's border, as ultralytics trains with it."""


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """Image file in memory."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


def encoded(file: Path | EncodedImage) -> EncodedImage:
    """The content of an image file (IntegrityError if it cannot be read)."""
    if isinstance(file, EncodedImage):
        return file
    try:
        return EncodedImage(str(file), file.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{file} cannot be read: {error.strerror}.", "Remove it from the folder.") from error


def opened_content(file: Path | EncodedImage) -> Path | io.BytesIO:
    """What Pillow opens."""
    return io.BytesIO(file.content) if isinstance(file, EncodedImage) else file


@dataclass(frozen=True, eq=False)
class ImageInput:
    """The model's one input, and how an image becomes it.

    Attributes:
        name: of the input.
        shape: ``C, H, W``.
        mean, std: float32 ``[C or 1, 1, 1]``.
        resize: shorter side before a centre crop, in pixels; None resizes to the input's size.
        letterboxed: whether the image is scaled to fit, and its border is grey.
    """

    name: str
    shape: tuple[int, int, int]
    mean: np.ndarray
    std: np.ndarray
    resize: int | None = None
    letterboxed: bool = False

    @classmethod
    def of(cls, examples: Mapping[str, np.ndarray], affine: Affine, task: Task | None = None) -> ImageInput:
        """Check that images fit a model.

        Args:
            examples: inputs by name.
            task: what an ultralytics checkpoint says. Its images are letterboxed; those to classify are cropped.

        Raises:
            UsageError: the model has no image as its only input, or the preprocessing is for other channels.
            MissingRuntimeError: Pillow is missing.
        """
        try:
            import PIL.Image  # noqa: F401  (fail before any work is done)
        except ImportError as error:
            raise MissingRuntimeError("Reading images needs Pillow.", "pip install 'scconv-deploy[data]'") from error
        if len(examples) != 1:
            raise UsageError(f"Images fit one input, but the model has {', '.join(examples)}.", "Give an .npz.")
        ((key, example),) = examples.items()
        if example.ndim != 4 or example.shape[1] not in (1, 3) or example.dtype.kind != "f":
            found = f"{example.dtype}{list(example.shape)}"
            raise UsageError(f"Input {key} is {found}, not an image float[N, 1 or 3, H, W].", "Give an .npz.")
        mean, std = (np.asarray(v, dtype=np.float32).reshape(-1, 1, 1) for v in affine[:2])
        channels, height, width = example.shape[1:]
        if len(mean) not in (1, channels) or len(std) not in (1, channels):
            raise UsageError(
                f"Preprocessing has {len(mean)} means and {len(std)} deviations; {key} has {channels} channels.",
                "Give one for each channel.",
            )
        resize = affine[2]
        if task is not None and task.kind == "classify" and resize is None:
            resize = min(height, width)
        letterboxed = task is not None and task.kind != "classify" and resize is None
        return cls(key, (channels, height, width), mean, std, resize, letterboxed)

    def read(self, file: Path | EncodedImage, upright: bool = False) -> tuple[np.ndarray, Placement]:
        """An image as float32 ``[C, H, W]``, and where it lies in it.

        Args:
            upright: turn it as the camera says, as annotations are drawn; what is letterboxed always is.

        Raises:
            IntegrityError: the file is damaged or no image.
        """
        from PIL import Image, ImageOps

        channels, height, width = self.shape
        try:
            with Image.open(opened_content(file)) as opened:
                turned = ImageOps.exif_transpose(opened) if upright or self.letterboxed else opened
                image = turned.convert("RGB" if channels == 3 else "L")
                pixels, placement = self._letterbox(image) if self.letterboxed else self._resized(image)
        except Exception as error:  # each reader of Pillow has its own exceptions
            raise IntegrityError(f"{file} is damaged or not an image.", "Remove it from the folder.") from error
        values = np.asarray(pixels, dtype=np.float32).reshape(height, width, -1).transpose(2, 0, 1) / 255
        return (values - self.mean) / self.std, placement

    def place(self, size: tuple[int, int]) -> tuple[Placement, tuple[int, int]]:
        """Where an image of this width and height lies in the input, and its size there before it is cropped."""
        target: tuple[int, int] = self.shape[2], self.shape[1]
        if self.letterboxed:
            gain = min(side / own for side, own in zip(target, size, strict=True))
            wide, high = (max(round(own * gain), 1) for own in size)
            left, top = (round((side - own) / 2 - 0.1) for side, own in zip(target, (wide, high), strict=True))
            return Placement(size, target, (gain, gain), (left, top)), (wide, high)
        if self.resize is None:
            wide, high = target
        else:
            scale = self.resize / min(size)
            wide, high = (max(round(own * scale), least) for own, least in zip(size, target, strict=True))
        offset = -((wide - target[0]) // 2), -((high - target[1]) // 2)
        return Placement(size, target, (wide / size[0], high / size[1]), offset), (wide, high)

    def _resized(self, image: Image) -> tuple[np.ndarray, Placement]:
        from PIL.Image import Resampling

        placement, (wide, high) = self.place(image.size)
        left, top = (-offset for offset in placement.offset)
        resized = image.resize((wide, high), Resampling.BILINEAR)
        width, height = placement.input_size
        return np.asarray(resized.crop((left, top, left + width, top + height))), placement

    def _letterbox(self, image: Image) -> tuple[np.ndarray, Placement]:
        """Scaled without antialiasing, rounded to whole values and centred, as ultralytics does it with OpenCV."""
        from torch import from_numpy
        from torch.nn.functional import interpolate

        placement, (wide, high) = self.place(image.size)
        pixels = np.asarray(image, dtype=np.float32).reshape(*image.size[::-1], -1)
        if (wide, high) != image.size:
            planes = from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None]
            pixels = interpolate(planes, (high, wide), mode="bilinear")[0].numpy().transpose(1, 2, 0).round()
        (width, height), (left, top) = placement.input_size, placement.offset
        boxed = np.full((height, width, pixels.shape[2]), _GREY, dtype=np.float32)
        boxed[top : top + high, left : left + wide] = pixels
        return boxed, placement


def require_files(source: str, files: Sequence[Path]) -> None:
    """Refuse a data set whose images are not all there (UsageError); the first missing one is named."""
    missing = [file for file in files if not file.is_file()]
    if missing:
        more = f", and so do {len(missing) - 1} others" if len(missing) > 1 else ""
        raise UsageError(
            f"{source}: the image {missing[0]} does not exist{more}.", "Put it there, or take it out of the list."
        )


def images_in(folder: Path) -> list[Path]:
    """Images of a folder and of the folders in it, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def known_suffixes() -> str:
    """Suffixes of images as text."""
    return f"Known: {', '.join(SUFFIXES)}."
