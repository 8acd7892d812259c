"""YOLO checkpoints with ScConv: does the deployed file give in ``YOLO("model.onnx")`` what the checkpoint gives?

Needs ultralytics, in an environment of its own: pip install ultralytics, and this project. Each network is built with
ScConv in its bottlenecks, trained a few steps on drawn rectangles in noise, and deployed from its ``best.pt``, whose
batch norms are settled (see :func:`settle`). Then ultralytics itself predicts and validates with both files. Boxes are
paired one to one, best first: of one class, overlapping by at least 0.9.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import ultralytics
import ultralytics.utils
from PIL import Image, ImageDraw
from torch import nn

from benchmarks import yolo_fork
from benchmarks.harness import Row, write
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.workflows.deploy import deploy_spec
from scconv_deploy.workflows.export import ExportOptions
from scconv_deploy.zoo.nms import overlaps

SMALLEST_OVERLAP = 0.9
CONFIDENCE = 0.001
"""Of boxes that are compared: after a few steps none is sure."""
NETWORKS = {
    "yolov8n": "detect", "yolov8n-seg": "segment", "yolov8n-cls": "classify", "yolov8n-pose": "pose",
    "yolov8n-obb": "obb", "yolo11n": "detect", "yolov8-rtdetr": "detect", "yolov10n": "detect", "yolov5n": "detect",
    "yolo12n": "detect", "yolov9t": "detect", "yolo26n": "detect",
}  # fmt: skip
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}
_METRICS = ("metrics/mAP50-95(B)", "metrics/accuracy_top1")
_COLUMNS = {
    "network": "network",
    "task": "task",
    "batch": "batch",
    "SRUs": "srus",
    "verdict": "verdict",
    "output0, relative L2": "output0",
    "boxes, checkpoint": "boxes",
    "boxes, file": "boxes_onnx",
    "matched one to one": "matched",
    "max abs, pixels": "max_abs_box",
    "max abs, score": "max_abs_score",
    "max abs, keypoints": "max_abs_keypoints",
    "mask pixels that differ": "mask_pixels",
    "metric, checkpoint": "metric",
    "metric, file": "metric_onnx",
    "deploy": "deploy_s",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--size", type=int, default=224, help="of images, in pixels (default 224)")
    parser.add_argument("--epochs", type=int, default=3, help="of training, on eight images (default 3)")
    parser.add_argument("--batch", metavar="MIN:OPT:MAX", help="deploy with an open batch")


def run(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        ultralytics.utils.SETTINGS.update({"sync": False, "datasets_dir": folder, "runs_dir": folder})
        for network in options.networks:
            started = time.perf_counter()
            rows.append(_network(options, network, Path(folder) / network))
            print(f"{network}: {time.perf_counter() - started:.0f} s", flush=True)
            facts = {"size": options.size, "epochs": options.epochs, "seed": options.seed}
            write(options.results, rows, _COLUMNS, ultralytics=version("ultralytics"), **facts)


def _network(options: argparse.Namespace, network: str, folder: Path) -> Row:
    task = NETWORKS[network]
    data = draw(folder / "data", task, options.size, options.seed)
    kind = ultralytics.RTDETR if "detr" in network else ultralytics.YOLO
    with yolo_fork.bottlenecks():
        model = kind(f"{network}.yaml")
        model.train(
            data=str(data), epochs=options.epochs, imgsz=options.size, batch=4, workers=0, device="cpu", amp=False,
            plots=False, project=str(folder), name="run", seed=options.seed, val=False, verbose=False, mosaic=0.0,
            optimizer="AdamW", lr0=0.003, warmup_epochs=0,
        )  # fmt: skip
    best = folder / "run" / "weights" / "best.pt"
    images = sorted((data if data.is_dir() else data.parent).glob("**/val/**/*.png"))
    settle(best, images)
    dynamic = (DynamicAxis.parse_batch(options.batch),) if options.batch else ()
    spec = ModelSpec(str(best), dynamic=dynamic, trust_checkpoint=True, seed=options.seed)
    started = time.perf_counter()
    result = deploy_spec(spec, folder / "out", ExportOptions())
    seconds = time.perf_counter() - started
    settings: dict[str, Any] = {"imgsz": options.size, "conf": CONFIDENCE, "verbose": False, "rect": False}
    told = {} if kind is ultralytics.RTDETR else {"task": task}  # RTDETR knows but one
    both = [kind(str(best)), kind(str(result.artifact), **told)]
    found = [[one for image in images for one in m.predict(str(image), device="cpu", **settings)] for m in both]
    metrics = [
        m.val(data=str(data), imgsz=options.size, batch=1, workers=0, device="cpu", plots=False, verbose=False,
              rect=False, project=str(folder), name=f"val{n}").results_dict
        for n, m in enumerate(both)
    ]  # fmt: skip
    pixels = [torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1)[None] / 255 for image in images]
    raw = [torch.cat([first(m.predictor.model(image)) for image in pixels]).double() for m in both]
    key = next(name for name in _METRICS if name in metrics[0])
    row: Row = {
        "network": network, "task": task, "batch": options.batch or "1", "verdict": result.report.verdict,
        "why": "" if result else result.report.headline,
        "srus": len(result.report.srus), "output0": float((raw[1] - raw[0]).norm() / raw[0].norm()),
        "deploy_s": seconds, "metric_name": key,
        "metric": float(metrics[0][key]), "metric_onnx": float(metrics[1][key]),
    }  # fmt: skip
    return row | (compare_classes(*found) if task == "classify" else compare(*found))


def settle(path: Path, images: list[Path]) -> None:
    """Give a checkpoint's batch norms the statistics of the images, in place.

    A few steps leave them near their start, and features fade from layer to layer: then all anchors have one score, and
    suppression chooses among their boxes by rounding.
    """
    checkpoint = torch.load(path, weights_only=False)
    model = (checkpoint["ema"] or checkpoint["model"]).float()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all that it sees
        norm.train()
    pixels = [torch.from_numpy(np.array(Image.open(image))).permute(2, 0, 1) / 255 for image in images]
    with torch.no_grad():
        model(torch.stack(pixels))
    for norm in norms:
        norm.eval().momentum = 0.03
    model.half()
    torch.save(checkpoint, path)


# --- data ---------------------------------------------------------------------------------------------------------


def draw(folder: Path, task: str, size: int, seed: int) -> Path:
    """Eight images to train on and four to validate on, of coloured rectangles; the ``data`` that ultralytics takes."""
    generator = np.random.default_rng(seed)
    for part, count in (("train", 8), ("val", 4)):
        for number in range(count):
            shapes = list(_rectangles(generator, 1 if task == "classify" else 3, size))
            image = Image.fromarray(generator.integers(60, 180, (size, size, 3), np.uint8))
            for kind, box in shapes:
                ImageDraw.Draw(image).rectangle(box, fill=list(COLOURS.values())[kind])
            image = Image.blend(image, Image.fromarray(generator.integers(0, 256, (size, size, 3), np.uint8)), 0.2)
            if task == "classify":
                path = folder / part / list(COLOURS)[number % len(COLOURS)] / f"{number}.png"
            else:
                path = folder / "images" / part / f"{number}.png"
                label = folder / "labels" / part / f"{number}.txt"
                label.parent.mkdir(parents=True, exist_ok=True)
                label.write_text("".join(_label(task, kind, box, size) for kind, box in shapes))
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    if task == "classify":
        return folder
    names = "".join(f"  {n}: {name}\n" for n, name in enumerate(COLOURS))
    keypoints = "kpt_shape: [2, 3]\nflip_idx: [1, 0]\n" if task == "pose" else ""
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\n{keypoints}names:\n{names}")
    return data


def _rectangles(generator: np.random.Generator, count: int, size: int) -> Iterator[tuple[int, list[int]]]:
    for _ in range(count):
        left, top = generator.integers(0, size // 2, 2)
        width, height = generator.integers(size // 5, size // 2, 2)
        yield int(generator.integers(len(COLOURS))), [int(left), int(top), int(left + width), int(top + height)]


def _label(task: str, kind: int, box: list[int], size: int) -> str:
    left, top, right, bottom = (n / size for n in box)
    corners = [left, top, right, top, right, bottom, left, bottom]
    centre = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
    values = {"segment": corners, "obb": corners, "pose": [*centre, left, top, 2, right, bottom, 2]}.get(task, centre)
    return f"{kind} {' '.join(f'{value:.5f}' for value in values)}\n"


# --- comparison ---------------------------------------------------------------------------------------------------


def compare_classes(expected: list[Any], actual: list[Any]) -> Row:
    """Largest difference of probabilities."""
    pairs = zip(expected, actual, strict=True)
    return {"max_abs_score": max(float((a.probs.data - b.probs.data).abs().max()) for a, b in pairs)}


def compare(expected: list[Any], actual: list[Any]) -> Row:
    """Boxes of all images: how many there are, how many pair up, and how far the pairs are apart."""
    total: Row = {"boxes": 0, "boxes_onnx": 0, "matched": 0}
    apart: dict[str, list[float]] = {"max_abs_box": [0.0], "max_abs_score": [0.0]}
    for theirs, ours in zip(expected, actual, strict=True):
        boxes, others = ours.obb or ours.boxes, theirs.obb or theirs.boxes
        if boxes is None or others is None:
            boxes, others = ours.boxes, theirs.boxes
        pairs = match(boxes, others)
        total["boxes"] += len(others)
        total["boxes_onnx"] += len(boxes)
        total["matched"] += len(pairs)
        for row, other in pairs:
            apart["max_abs_box"].append(float((boxes.xyxy[row] - others.xyxy[other]).abs().max()))
            apart["max_abs_score"].append(float((boxes.conf[row] - others.conf[other]).abs()))
            if ours.keypoints is not None:
                between = (ours.keypoints.data[row] - theirs.keypoints.data[other]).abs().max()
                apart.setdefault("max_abs_keypoints", []).append(float(between))
            if ours.masks is not None:
                differ = (ours.masks.data[row] != theirs.masks.data[other]).float().mean()
                apart.setdefault("mask_pixels", []).append(float(differ))
    return total | {name: max(values) for name, values in apart.items()}


def first(outputs: Any) -> torch.Tensor:
    """The first of a model's outputs, however nested."""
    return outputs if isinstance(outputs, torch.Tensor) else first(outputs[0])


def match(boxes: Any, others: Any) -> list[tuple[int, int]]:
    """Pairs (row, row of the others) of one image's detections."""
    both = torch.cat([boxes.xyxy, others.xyxy])
    overlap = overlaps(both)[: len(boxes), len(boxes) :]
    overlap[boxes.cls[:, None] != others.cls[None]] = -1
    pairs = []
    for row in range(len(boxes) if len(others) else 0):
        best, other = overlap[row].max(0)
        if best >= SMALLEST_OVERLAP:
            pairs.append((row, int(other)))
            overlap[:, other] = -1
    return pairs
