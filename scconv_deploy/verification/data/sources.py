"""Sources of real data: images, data sets, arrays, or a user's loader, read in blocks of rows.

Images and loaders are read block by block, so memory does not grow with the data; an ``.npz`` is read whole. Labels are
class numbers: the position of the class folder in the order of names, the array ``labels`` of an ``.npz``, or the
second item that a loader yields; data sets of objects yield targets (:mod:`.vision.targets`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from scconv_deploy.errors import IntegrityError, MissingRuntimeError, ScconvDeployError, UsageError, first_line
from scconv_deploy.verification.data.blocks import Block, DataSource
from scconv_deploy.verification.data.coco import coco_source
from scconv_deploy.verification.data.images import SUFFIXES, Affine, EncodedImage, ImageInput, encoded, known_suffixes
from scconv_deploy.verification.data.masks import IMAGES, MASKS, mask_source
from scconv_deploy.verification.data.ultralytics import YOLO_FILE, yolo_source
from scconv_deploy.verification.vision.targets import Task

PHOTOS = "photos"
"""Name of the source of scikit-learn's sample photographs."""
LABELS = "labels"

_ROWS_AT_ONCE = 64


def open_source(
    source: str, examples: Mapping[str, np.ndarray], affine: Affine, task: Task | None = None
) -> DataSource:
    """Open ``photos``, a folder of images (class subfolders give labels), an ultralytics or COCO data set, ``images/``
    with ``masks/``, an ``.npz`` or ``file.py:loader``.

    Images are resized (bilinear, antialiased) or, for an ultralytics checkpoint, letterboxed, scaled to [0, 1] and
    preprocessed; arrays are not changed.

    Args:
        examples: example inputs by name, for shapes and types.
        task: what an ultralytics checkpoint says of the model; None for others.

    Raises:
        UsageError, IntegrityError, ModelError, MissingRuntimeError: see :func:`.samples.load_samples`.
    """
    path = Path(source)
    if source == PHOTOS:
        return _image_source(PHOTOS, _shipped_photos(), None, ImageInput.of(examples, affine, task))
    if (described := path / YOLO_FILE).is_file():
        path = described
    if path.suffix.lower() in (".yaml", ".yml") and path.exists():
        return yolo_source(path, ImageInput.of(examples, affine, task), task)
    if path.suffix.lower() == ".json" and path.exists():
        return coco_source(path, ImageInput.of(examples, affine, task), task)
    if (path / IMAGES).is_dir() and (path / MASKS).is_dir():
        return mask_source(path, ImageInput.of(examples, affine, task))
    if path.is_dir():
        files, labels = _image_files(_validation_of(path))
        if not files:
            raise UsageError(f"--data {source}: no image in this folder.", known_suffixes())
        return _image_source(path.name, files, labels, ImageInput.of(examples, affine, task))
    if path.suffix == ".npz" and path.exists():
        return _npz_source(path, examples)
    if ":" in source and not path.exists():
        return _loader_source(source, examples)
    if not path.exists():
        kinds = f"Give a folder of images, a data.yaml, a COCO .json, an .npz, file.py:loader, or {PHOTOS!r}."
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


def _validation_of(folder: Path) -> Path:
    """The folder ``val`` or ``test`` of a data set of ultralytics to classify, else the folder itself."""
    parts = [folder / name for name in ("val", "test") if any((folder / "train").glob("*/"))]
    return next((part for part in parts if part.is_dir() and any(part.glob("*/"))), folder)


def _image_files(folder: Path) -> tuple[list[Path], np.ndarray | None]:
    """Images in the order of their names; with class subfolders, also the class number of each image."""

    def images(inside: Path) -> list[Path]:
        return sorted(p for p in inside.iterdir() if p.suffix.lower() in SUFFIXES)

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


def _image_source(
    name: str, files: Sequence[Path | EncodedImage], labels: np.ndarray | None, images: ImageInput
) -> DataSource:
    def blocks() -> Iterator[Block]:
        for index, file in enumerate(files):
            values, _ = images.read(file)
            yield Block({images.name: values[None]}, None if labels is None else labels[index : index + 1])

    def part(start: int, stop: int) -> DataSource:
        return _image_source(name, files[start:stop], None if labels is None else labels[start:stop], images)

    def carried() -> DataSource:
        return _image_source(name, [encoded(file) for file in files], labels, images)

    return DataSource(name, len(files), blocks, part, carried)


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
