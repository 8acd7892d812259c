"""Small data sets of objects, as ultralytics and COCO lay them out."""

from __future__ import annotations

import json

import numpy as np
from PIL import Image

NAMES = ("red", "green", "blue")
SIZES = ((48, 32), (32, 32), (20, 40))
"""Width and height of the images."""
BOXES = (((0, 0.5, 0.5, 0.5, 0.5), (2, 0.25, 0.25, 0.5, 0.5)), ((1, 0.5, 0.5, 1.0, 1.0),), ((0, 0.5, 0.25, 0.4, 0.3),))
"""Rows of class, centre x, centre y, width, height in parts of each image."""


def save_images(folder, seed=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(folder / f"{number}.png")


def ultralytics(folder, names=NAMES):
    """Write ``data.yaml``, ``images/val`` and ``labels/val``; return the path of the first."""
    save_images(folder / "images" / "val")
    (folder / "labels" / "val").mkdir(parents=True)
    for number, rows in enumerate(BOXES):
        text = "".join(" ".join(map(str, row)) + "\n" for row in rows)
        (folder / "labels" / "val" / f"{number}.txt").write_text(text)
    (folder / "data.yaml").write_text(f"path: .\ntrain: images/train\nval: images/val\nnames: {json.dumps(names)}\n")
    return folder / "data.yaml"


def coco(folder, names=NAMES, **changes):
    """Write ``annotations/instances_val.json`` and ``val/``; return the path of the first."""
    save_images(folder / "val")
    annotations = []
    for number, (rows, (width, height)) in enumerate(zip(BOXES, SIZES, strict=True)):
        for kind, x, y, w, h in rows:
            box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            annotations.append({"id": len(annotations), "image_id": number + 7, "category_id": kind * 10, "bbox": box})
    document = {
        "images": [{"id": n + 7, "file_name": f"{n}.png"} for n in range(len(SIZES))],
        "annotations": annotations,
        "categories": [{"id": n * 10, "name": name} for n, name in enumerate(names)],
        **changes,
    }
    (folder / "annotations").mkdir()
    path = folder / "annotations" / "instances_val.json"
    path.write_text(json.dumps(document))
    return path
