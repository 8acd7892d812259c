"""Sources of real data: images, arrays, or a user's loader, read in blocks of rows.

Images and loaders are read block by block, so memory does not grow with the data; an ``.npz`` is read whole. Labels are
class numbers: the position of the class folder in the order of names, the array ``labels`` of an ``.npz``, or the
second item that a loader yields.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scconv_deploy.errors import IntegrityError, MissingRuntimeError, ScconvDeployError, UsageError, first_line

PHOTOS = "photos"
"""Name of the source of scikit-learn's sample photographs."""
LABELS = "labels"

_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
_ROWS_AT_ONCE = 64
Affine = tuple[tuple[float, ...], tuple[float, ...], int | None]
"""Preprocessing: mean and standard deviation per channel, and the shorter side in pixels before a centre crop."""


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of data: one array per input, all of one length, and labels (int64, -1 for a row without) or None."""

    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def __getitem__(self, rows: slice) -> Block:
        return Block(
            {name: array[rows] for name, array in self.arrays.items()},
            None if self.labels is None else self.labels[rows],
        )

    def without_labels(self) -> Block:
        """The same rows without labels: -1 each, so that they do not count in the accuracy."""
        return Block(self.arrays, None if self.labels is None else np.full(len(self), -1, dtype=np.int64))

    @classmethod
    def joined(cls, blocks: Sequence[Block]) -> Block:
        """Join blocks into one, which has labels if all of them have."""
        if len(blocks) == 1:
            return blocks[0]
        arrays = {name: np.concatenate([b.arrays[name] for b in blocks]) for name in blocks[0].arrays}
        labels = [b.labels for b in blocks if b.labels is not None]
        return cls(arrays, np.concatenate(labels) if len(labels) == len(blocks) else None)


@dataclass(frozen=True, eq=False)
class DataSource:
    """Source of data.

    Attributes:
        name: name in the report.
        rows: number of rows; None if unknown before reading.
        blocks: reader of its blocks.
        part: (first row, row after the last) -> a source of these rows alone; None if the source can only be read from
            its start.
        carried: makes the same source with the content of its files in memory, for another machine; None if it reads no
            files.
    """

    name: str
    rows: int | None
    blocks: Callable[[], Iterator[Block]]
    part: Callable[[int, int], DataSource] | None = None
    carried: Callable[[], DataSource] | None = None


def open_source(source: str, examples: Mapping[str, np.ndarray], affine: Affine) -> DataSource:
    """Open ``photos``, a folder of images (class subfolders give labels), an ``.npz`` or ``file.py:loader``.

    Images are resized (bilinear, antialiased), scaled to [0, 1] and preprocessed; arrays are not changed.

    Args:
        examples: example inputs by name, for shapes and types.

    Raises:
        UsageError, IntegrityError, ModelError, MissingRuntimeError: see :func:`.samples.load_samples`.
    """
    path = Path(source)
    if source == PHOTOS:
        return _image_source(PHOTOS, _shipped_photos(), None, examples, affine)
    if path.is_dir():
        files, labels = _image_files(path)
        if not files:
            raise UsageError(f"--data {source}: no image in this folder.", f"Known: {', '.join(_IMAGE_SUFFIXES)}.")
        return _image_source(path.name, files, labels, examples, affine)
    if path.suffix == ".npz" and path.exists():
        return _npz_source(path, examples)
    if ":" in source and not path.exists():
        return _loader_source(source, examples)
    if not path.exists():
        kinds = f"Give a folder of images, an .npz, file.py:loader, or {PHOTOS!r}."
        raise UsageError(f"--data {source} does not exist.", kinds)
    raise UsageError(f"--data {source} is neither a folder nor an .npz.", "Put images into a folder of their own.")


# --- images ------------------------------------------------------------------------------------------------------


def _shipped_photos() -> list[Path]:
    try:
        import sklearn.datasets
    except ImportError as error:
        raise MissingRuntimeError(
            "--data photos needs scikit-learn, which ships them.", "pip install 'scconv-deploy[data]'"
        ) from error
    folder = Path(sklearn.datasets.__file__).parent / "images"
    return sorted(folder.glob("*.jpg"))


def _image_files(folder: Path) -> tuple[list[Path], np.ndarray | None]:
    """Images in the order of their names; with class subfolders, also the class number of each image."""

    def images(inside: Path) -> list[Path]:
        return sorted(p for p in inside.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)

    folders = [p for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith(".")]  # .ipynb_checkpoints
    classes = [images(p) for p in folders]
    if files := images(folder):
        if any(classes):
            raise UsageError(
                f"--data {folder} holds images ({files[0].name}) and folders of images: it is unclear what a class is.",
                "Move the images that lie beside the class folders.",
            )
        return files, None
    labels = [number for number, files in enumerate(classes) for _ in files]
    return [file for files in classes for file in files], np.asarray(labels, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class _Encoded:
    """Image file in memory."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


def _image_source(
    name: str,
    files: Sequence[Path | _Encoded],
    labels: np.ndarray | None,
    examples: Mapping[str, np.ndarray],
    affine: Affine,
) -> DataSource:
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
    if len(mean) not in (1, example.shape[1]) or len(std) not in (1, example.shape[1]):
        raise UsageError(
            f"Preprocessing has {len(mean)} means and {len(std)} deviations; {key} has {example.shape[1]} channels.",
            "Give one for each channel.",
        )

    def blocks() -> Iterator[Block]:
        for index, file in enumerate(files):
            values = (_image(file, example.shape[1:], affine[2]) - mean) / std
            yield Block({key: values[None]}, None if labels is None else labels[index : index + 1])

    def part(start: int, stop: int) -> DataSource:
        return _image_source(name, files[start:stop], None if labels is None else labels[start:stop], examples, affine)

    def carried() -> DataSource:
        content = [f if isinstance(f, _Encoded) else _Encoded(str(f), _bytes_of(f)) for f in files]
        return _image_source(name, content, labels, examples, affine)

    return DataSource(name, len(files), blocks, part, carried)


def _bytes_of(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise IntegrityError(f"{file} cannot be read: {error.strerror}.", "Remove it from the folder.") from error


def _image(file: Path | _Encoded, shape: Sequence[int], resize: int | None) -> np.ndarray:
    """An image as float32 ``[C, H, W]`` in [0, 1]."""
    from PIL import Image

    channels, height, width = shape
    try:
        with Image.open(io.BytesIO(file.content) if isinstance(file, _Encoded) else file) as image:
            converted = image.convert("RGB" if channels == 3 else "L")
            if resize is None:
                converted = converted.resize((width, height), Image.Resampling.BILINEAR)
            else:
                scale = resize / min(converted.size)
                wide, high = (
                    max(round(side * scale), least) for side, least in zip(converted.size, (width, height), strict=True)
                )
                converted = converted.resize((wide, high), Image.Resampling.BILINEAR)
                left, top = (wide - width) // 2, (high - height) // 2
                converted = converted.crop((left, top, left + width, top + height))
    except Exception as error:  # each reader of Pillow has its own exceptions
        raise IntegrityError(f"{file} is damaged or not an image.", "Remove it from the folder.") from error
    return np.asarray(converted, dtype=np.float32).reshape(height, width, -1).transpose(2, 0, 1) / 255


# --- arrays ------------------------------------------------------------------------------------------------------


def _npz_source(path: Path, examples: Mapping[str, np.ndarray]) -> DataSource:
    with _readable(path), np.load(path, allow_pickle=False) as archive:
        arrays = {name: _array(archive, name) for name in archive.files}
    labelled = LABELS in arrays and LABELS not in examples
    if set(arrays) - ({LABELS} if labelled else set()) != set(examples):
        raise UsageError(
            f"--data {path} holds {', '.join(arrays) or 'nothing'}.",
            f"Save one array per input: {', '.join(examples)} (and {LABELS}, if you have them).",
        )
    for name, example in examples.items():
        array, sizes = arrays[name], example.shape[1:]
        if not 0 < array.ndim == example.ndim or array.shape[1:] != sizes or array.dtype.kind not in "biuf":
            expected = ", ".join(map(str, ["N", *sizes]))
            raise UsageError(
                f"--data {path}: {name} is {array.dtype}{list(array.shape)}, expected numbers [{expected}].",
                "Save it in the input's shape.",
            )
    if labelled and (arrays[LABELS].ndim != 1 or arrays[LABELS].dtype.kind not in "iu"):
        found = f"{arrays[LABELS].dtype}{list(arrays[LABELS].shape)}"
        raise UsageError(f"--data {path}: {LABELS} is {found}, expected integers [N].", "Save class numbers.")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UsageError(f"--data {path}: {found}; expected as many of each.", "Give every array the same length.")
    return _array_source(path.name, arrays, labelled)


def _array_source(name: str, arrays: Mapping[str, np.ndarray], labelled: bool) -> DataSource:
    rows = len(next(iter(arrays.values())))

    def blocks() -> Iterator[Block]:
        for start in range(0, rows, _ROWS_AT_ONCE):  # copied, and in the machine's byte order
            taken = {key: array[start : start + _ROWS_AT_ONCE] for key, array in arrays.items()}
            labels = taken.pop(LABELS).astype(np.int64) if labelled else None
            yield Block({key: a.astype(a.dtype.newbyteorder("=")) for key, a in taken.items()}, labels)

    def part(start: int, stop: int) -> DataSource:
        return _array_source(name, {key: array[start:stop] for key, array in arrays.items()}, labelled)

    return DataSource(name, rows, blocks, part)


def npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of an ``.npz`` by name (IntegrityError if it is damaged)."""
    with _readable(path), np.load(path, allow_pickle=False) as archive:
        return {name: _array(archive, name).shape for name in archive.files}


def _array(archive: Mapping[str, Any], name: str) -> np.ndarray:
    found = archive[name]
    if not isinstance(found, np.ndarray):  # NumPy returns bytes for a member that is no array
        raise ValueError(f"{name} is no array")
    return found


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Convert any error on a damaged archive to an IntegrityError in one line."""
    try:
        yield
    except ScconvDeployError:
        raise
    except Exception as error:  # zipfile, zlib and NumPy have their own exceptions
        reason = first_line(error, type(error).__name__).split(". ")[0].rstrip(".")
        raise IntegrityError(f"--data {path} is damaged or not an .npz: {reason}.", "Save it with np.savez.") from error


# --- a loader ----------------------------------------------------------------------------------------------------


def _loader_source(source: str, examples: Mapping[str, np.ndarray]) -> DataSource:
    """Open a user's iterable, or a callable that returns one, of batches: inputs, or (inputs, labels).

    Inputs are an array or tensor for a single input, or a mapping by name; a DataLoader of (images, labels) fits.
    """
    from scconv_deploy.model.user_code import import_object, running_user_code

    target = import_object(source)

    def blocks() -> Iterator[Block]:
        with running_user_code(source):
            iterator = iter(target() if callable(target) else target)
        while True:
            with running_user_code(source):
                item = next(iterator, None)
            if item is None:
                return
            yield _block_of(item, source, examples)

    return DataSource(source.rpartition("/")[2], None, blocks)


def _as_array(value: Any, name: str, source: str) -> np.ndarray:
    """Convert a loader's value to a NumPy array; tensors are detached first."""
    try:
        return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise UsageError(
            f"--data {source} yields something for {name} that NumPy cannot hold: {reason}.", "Yield float32 arrays."
        ) from error


def _block_of(item: Any, source: str, examples: Mapping[str, np.ndarray]) -> Block:
    labelled = isinstance(item, (tuple, list)) and len(item) == 2
    inputs, labels = item if labelled else (item, None)
    if isinstance(inputs, (tuple, list)) and len(inputs) == len(examples):
        inputs = dict(zip(examples, inputs, strict=True))
    if not isinstance(inputs, Mapping):
        inputs = dict.fromkeys(list(examples)[:1], inputs)
    arrays = {name: _as_array(value, name, source) for name, value in inputs.items()}
    if set(arrays) != set(examples):
        raise UsageError(
            f"--data {source} yields {', '.join(arrays)}; the inputs are {', '.join(examples)}.",
            "Yield a mapping with one array per input, or (mapping, labels).",
        )
    for name, example in examples.items():
        array, sizes = arrays[name], list(example.shape[1:])
        if array.ndim != example.ndim or list(array.shape[1:]) != sizes or array.dtype.kind not in "biuf":
            expected = ", ".join(map(str, ["N", *sizes]))
            raise UsageError(
                f"--data {source} yields {array.dtype}{list(array.shape)} for {name}, expected numbers [{expected}].",
                "Yield batches in the input's shape, or (inputs, labels).",
            )
    if len({len(array) for array in arrays.values()}) != 1:
        raise UsageError(f"--data {source} yields inputs of different lengths.", "Yield as many rows of each.")
    numbers = None if labels is None else _as_array(labels, "the labels", source)
    rows = len(next(iter(arrays.values())))
    if numbers is not None and (numbers.shape != (rows,) or numbers.dtype.kind not in "iu"):
        found = f"{numbers.dtype}{list(numbers.shape)}"
        raise UsageError(f"--data {source} yields labels {found}, expected integers [{rows}].", "Yield class numbers.")
    return Block(arrays, None if numbers is None else numbers.astype(np.int64))
