"""Data sets of ultralytics: ``data.yaml`` with ``path``, ``val`` and ``names``, ``labels/`` beside ``images/``.

A line of a label file is a class number and a box (centre, width, height; of a pose then its keypoints) or a polygon
(its corners), in parts of the image. An image without a label file shows nothing, as ultralytics takes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scconv_deploy.errors import IntegrityError, MissingRuntimeError, UsageError, first_line
from scconv_deploy.verification.data.blocks import DataSource
from scconv_deploy.verification.data.boxes import AnnotatedImage, box_source
from scconv_deploy.verification.data.classes import require_same_classes
from scconv_deploy.verification.data.images import ImageInput, images_in, known_suffixes, require_files
from scconv_deploy.verification.vision.average_precision import require_pycocotools
from scconv_deploy.verification.vision.targets import Task

YOLO_FILE = "data.yaml"
"""Name of the file in a folder that is such a data set."""
_OTHER_METRIC = ("classify", "obb")
"""Tasks whose labels are no boxes."""
_SLACK = 1e-2
"""How far a coordinate may lie outside the image, in parts of it: ultralytics allows as much."""


def yolo_source(path: Path, images: ImageInput, task: Task | None) -> DataSource:
    """Open the validation part of a data set.

    Args:
        path: its ``.yaml``.
        task: what the checkpoint says; None for a model of others, whose class numbers must be the data set's.

    Raises:
        UsageError: no ``val``, no image, no label file at all, other classes than the model's, or a task without boxes.
        IntegrityError: the file is no YAML, or a line of a label file is malformed; it is named.
        MissingRuntimeError: PyYAML is missing.
    """
    if task is not None and task.kind in _OTHER_METRIC:
        what = "a folder with a folder for each class" if task.kind == "classify" else "no such data set"
        raise UsageError(
            f"--data {path} holds boxes, and the model's task is {task.kind}, for which --data takes {what}.",
            "Give a folder of images; without labels, outputs and gates are compared.",
        )
    require_pycocotools()
    described = _read_yaml(path)
    names = _names(path, described)
    if task is not None:
        require_same_classes(f"--data {path}", names, task)
    files = _validation_images(path, described)
    require_files(f"--data {path}", files)
    labels = [_label_file(file) for file in files]
    if not any(label.is_file() for label in labels):
        raise UsageError(
            f"--data {path}: none of {len(files)} images has a label file; the first would be {labels[0]}.",
            "Put labels/ beside images/.",
        )
    posed = "kpt_shape" in described or (task is not None and task.kind == "pose")
    annotated = [
        AnnotatedImage(file, _read_labels(label, len(names), posed), relative=True, annotated=label.is_file())
        for file, label in zip(files, labels, strict=True)
    ]
    return box_source(path.parent.name or path.name, annotated, images, task)


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise MissingRuntimeError("Reading a data.yaml needs PyYAML.", "pip install 'scconv-deploy[data]'") from error
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise IntegrityError(f"--data {path} is no YAML: {first_line(error)}.", "Look at the file.") from error
    if not isinstance(found, dict):
        raise UsageError(f"--data {path} holds no keys.", "It must say path, val and names.")
    if not found.get("val"):
        raise UsageError(f"--data {path} names no images to validate on: it has no val.", "Add val: images/val to it.")
    return found


def _names(path: Path, described: Mapping[str, Any]) -> dict[int, str]:
    names = described.get("names")
    if names is None and isinstance(described.get("nc"), int):
        return {n: f"class{n}" for n in range(described["nc"])}
    pairs = (
        list(names.items()) if isinstance(names, dict) else list(enumerate(names if isinstance(names, list) else ()))
    )
    found = {number: str(name) for number, name in pairs if isinstance(number, int)}
    if not found or sorted(found) != list(range(len(pairs))):
        raise UsageError(f"--data {path}: names must be a list, or numbers from 0 with a name each.", "Mend names.")
    return found


def _validation_images(path: Path, described: Mapping[str, Any]) -> list[Path]:
    entries = described["val"] if isinstance(described["val"], list) else [described["val"]]
    root = _first_existing(Path(str(described.get("path") or ".")), path.parent)
    files: list[Path] = []
    for entry in map(str, entries):
        place = _first_existing(Path(entry), root, path.parent)
        if not place.exists() and entry.startswith("../"):  # Roboflow writes it from a folder that is not there
            place = root / entry.removeprefix("../")
        if not place.exists():
            raise UsageError(f"--data {path}: val is {entry}, and {root / entry} does not exist.", "Mend path or val.")
        files += images_in(place) if place.is_dir() else _listed(place)
    if not files:
        raise UsageError(f"--data {path}: val ({', '.join(map(str, entries))}) holds no image.", known_suffixes())
    return files


def _first_existing(path: Path, *folders: Path) -> Path:
    """A path taken from the first of these folders in which it exists; else from the first."""
    found = [folder / path for folder in folders]  # an absolute path stays as it is
    return next((one for one in (*found, path) if one.exists()), found[0])


def _listed(file: Path) -> list[Path]:
    """Images that a ``.txt`` names, one a line, from its own folder."""
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [_first_existing(Path(line), file.parent) for line in lines]


def _label_file(image: Path) -> Path:
    """Label file of an image: the last folder ``images`` of its path is ``labels``."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _read_labels(file: Path, classes: int, posed: bool) -> np.ndarray:
    """Rows of class, left, top, right, bottom (in parts of the image), 0: float64 ``[M, 6]``, each once.

    Args:
        posed: whether keypoints follow each box.

    Raises:
        IntegrityError: a line is malformed; it is named.
    """
    if not file.is_file():
        return np.zeros((0, 6))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"{file} is no text: {first_line(error)}.", "Write the labels again.") from error
    rows = [_row(file, number, line.split(), classes, posed) for number, line in enumerate(lines, 1) if line.strip()]
    return np.array(list(dict.fromkeys(rows)), dtype=np.float64).reshape(-1, 6)


def _row(file: Path, number: int, words: Sequence[str], classes: int, posed: bool) -> tuple[float, ...]:
    def refuse(what: str) -> IntegrityError:
        return IntegrityError(
            f"{file}, line {number}: {what}.",
            "A line is: class, centre x, centre y, width, height (or a polygon's x and y), in parts of the image.",
        )

    try:
        values = [float(word) for word in words]
    except ValueError as error:
        raise refuse(f"{' '.join(words)[:60]!r} is not only numbers") from error
    if posed:
        values = values[:5]
    if len(values) < 5 or len(values) % 2 == 0:
        raise refuse(f"{len(values)} numbers, expected 5, or a class and at least 3 points")
    if values[0] != int(values[0]) or not 0 <= values[0] < classes:
        raise refuse(f"class {words[0]} is outside 0 to {classes - 1}")
    places = np.array(values[1:])
    if not (np.isfinite(places).all() and (places >= -_SLACK).all() and (places <= 1 + _SLACK).all()):
        raise refuse("a place is outside the image (0 to 1)")
    return values[0], *_corners(places), 0.0


def _corners(places: np.ndarray) -> tuple[float, ...]:
    """Corners of a box, or of the box around a polygon."""
    if len(places) == 4:
        x, y, width, height = places
        return float(x - width / 2), float(y - height / 2), float(x + width / 2), float(y + height / 2)
    xs, ys = places[::2], places[1::2]
    return float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())
