"""COCO data sets: ``instances_*.json`` with its folder of images."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scconv_deploy.errors import IntegrityError, UsageError, first_line
from scconv_deploy.verification.data.blocks import DataSource
from scconv_deploy.verification.data.boxes import AnnotatedImage, box_source
from scconv_deploy.verification.data.classes import require_same_classes
from scconv_deploy.verification.data.images import ImageInput, require_files
from scconv_deploy.verification.vision.average_precision import require_pycocotools
from scconv_deploy.verification.vision.targets import Task

_LISTS = ("images", "annotations", "categories")
_NO_BOXES = ("classify", "obb")


def coco_source(path: Path, images: ImageInput, task: Task | None) -> DataSource:
    """Open a data set. The categories in the order of their ids are the classes 0, 1, 2 ...

    Args:
        path: the ``.json``. The images are in a folder beside it or one above: its split's name (``val2017``),
            ``images/`` with or without it, or the folder itself.
        task: what an ultralytics checkpoint says; None for others.

    Raises:
        UsageError: the file has other classes than the model or no image, the images are not found, or the model's
            task has no boxes.
        IntegrityError: the file is no COCO file, or an annotation is malformed; it is named.
    """
    if task is not None and task.kind in _NO_BOXES:
        raise UsageError(f"--data {path} holds boxes, and the model's task is {task.kind}.", "Give a folder of images.")
    require_pycocotools()
    document = _read(path)
    classes, names = _classes(path, document["categories"])
    if task is not None:
        require_same_classes(f"--data {path}", names, task)
    annotated = _annotated(path, document, classes)

    return box_source(path.stem, annotated, images, task)


def _read(path: Path) -> dict[str, list[Any]]:
    remedy = "Give the instances_*.json of a COCO data set."
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"--data {path} is no JSON: {first_line(error)}.", remedy) from error
    missing = [name for name in _LISTS if not isinstance(found, dict) or not isinstance(found.get(name), list)]
    if missing:
        raise IntegrityError(f"--data {path} is no COCO file: it has no list {missing[0]}.", remedy)
    if not found["images"]:
        raise UsageError(f"--data {path} lists no image.", "Give a set with at least one.")
    return {name: found[name] for name in _LISTS}


def _classes(path: Path, categories: Sequence[Any]) -> tuple[dict[Any, int], dict[int, str]]:
    """Class number of each category's id, and the names by number."""
    try:
        ordered = sorted((one["id"], str(one["name"])) for one in categories)
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"--data {path}: a category has no id or name.", "Mend the categories.") from error
    classes = {key: number for number, (key, _) in enumerate(ordered)}
    if len(classes) < len(ordered):
        raise IntegrityError(f"--data {path}: two categories have one id.", "Mend the categories.")
    return classes, {classes[key]: name for key, name in ordered}


def _annotated(path: Path, document: Mapping[str, Sequence[Any]], classes: Mapping[Any, int]) -> list[AnnotatedImage]:
    try:
        files = {one["id"]: str(one["file_name"]) for one in document["images"]}
    except (KeyError, TypeError) as error:
        raise IntegrityError(f"--data {path}: an image has no id or file_name.", "Mend the images.") from error
    if len(files) < len(document["images"]):
        raise IntegrityError(f"--data {path}: two images have one id.", "Mend the images.")
    rows: defaultdict[Any, list[tuple[float, ...]]] = defaultdict(list)
    for number, one in enumerate(document["annotations"]):
        image, row = _row(path, number, one, files, classes)
        rows[image].append(row)
    folder = _folder_of(path, next(iter(files.values())))
    require_files(f"--data {path}", [folder / name for name in files.values()])
    return [AnnotatedImage(folder / name, np.array(rows[key]).reshape(-1, 6)) for key, name in files.items()]


def _row(
    path: Path, number: int, one: Any, files: Mapping[Any, str], classes: Mapping[Any, int]
) -> tuple[Any, tuple[float, ...]]:
    """Image id of an annotation, and its class, corners and crowd."""

    def refuse(what: str) -> IntegrityError:
        return IntegrityError(f"--data {path}: annotation {number} {what}.", "Mend or remove it.")

    try:
        image, category = one["image_id"], one["category_id"]
        left, top, width, height = map(float, one["bbox"])
        crowd = float(bool(one.get("iscrowd", 0)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise refuse("has no image_id, category_id or bbox of four numbers") from error
    if image not in files:
        raise refuse(f"is of image {image!r}, which the file does not list")
    if category not in classes:
        raise refuse(f"is of category {category!r}, which the file does not list")
    if not np.isfinite([left, top, width, height]).all() or width < 0 or height < 0:
        raise refuse(f"has the bbox {one['bbox']}, expected finite x, y, width, height")
    return image, (float(classes[category]), left, top, left + width, top + height, crowd)


def _folder_of(path: Path, name: str) -> Path:
    """Folder in which the first image stands."""
    split = path.stem.rpartition("_")[2]
    around = (path.parent, path.parent.parent)
    places = [folder / part for folder in around for part in ("", "images", split, f"images/{split}") if part or folder]
    for place in places:
        if (place / name).is_file():
            return place
    raise UsageError(
        f"--data {path}: its first image, {name}, is in none of {', '.join(map(str, places))}.",
        "Put the images into one of these folders.",
    )
