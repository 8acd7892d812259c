"""RetinaNet-R50 with ScConv in its backbone: are ONNX Runtime's boxes PyTorch's, and how long does an image take?

Every image goes through PyTorch and through the exported graph, suppression included, each running free: gates that
upstream rounding moves are part of what is compared. Boxes are paired one to one, best first: a box of the artifact
goes to the free box of PyTorch's that has its class and overlaps it most, by at least 0.9. Time is of one image.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import scconv_deploy
from benchmarks import subjects
from benchmarks.harness import Row, interleave, write
from scconv_deploy.model.signature import Signature
from scconv_deploy.verification.preprocessing import Preprocessing
from scconv_deploy.verification.samples import load_samples, noise_samples
from scconv_deploy.zoo import MODELS
from scconv_deploy.zoo.nms import overlaps

SMALLEST_OVERLAP = 0.9
BASELINE = "PyTorch eager"
_COLUMNS = {
    "network": "network",
    "variant": "variant",
    "median": "median_s",
    "min": "min_s",
    "p25": "p25_s",
    "p75": "p75_s",
    "faster than eager": "speedup",
    "images": "images",
    "boxes": "boxes",
    "matched one to one": "matched",
    "same row": "same_row",
    "max abs, pixels": "max_abs_box",
    "max abs, score": "max_abs_score",
}

Detections = dict[str, Tensor]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--networks", nargs="+", choices=("scconv_retinanet_r50", "retinanet_r50"),
        default=["scconv_retinanet_r50", "retinanet_r50"],
    )  # fmt: skip
    parser.add_argument("--data", default="photos", help="images to detect in, as the command line's --data")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=1)


def run(options: argparse.Namespace) -> None:
    rows = [row for name in options.networks for row in _network(options, name)]
    write(options.results, rows, _COLUMNS, data=options.data, seed=options.seed, warmup=options.warmup)


def _network(options: argparse.Namespace, name: str) -> list[Row]:
    model = scconv_deploy.load(scconv_deploy.ModelSpec(name, seed=options.seed))
    shape = MODELS[name].input_shape
    x = subjects.noise(shape, options.seed)
    signature = Signature((x,), {}, ("image",))
    photos = load_samples(options.data, signature, Preprocessing.of(name, model)) if options.data else ()
    samples = [*noise_samples(signature, options.seed), *photos]
    with tempfile.TemporaryDirectory() as folder:
        data = scconv_deploy.export(model, x, Path(folder) / "model.onnx").path.read_bytes()
    session = subjects.session(data)
    names = [output.name for output in session.get_outputs()]

    def in_ort(image: Tensor) -> Detections:
        values = session.run(None, {"image": image.numpy()})
        return {key: torch.from_numpy(value) for key, value in zip(names, values, strict=True)}

    images = [image[None] for sample in samples for image in sample.tensors["image"]]
    found = compare(model, in_ort, images)
    variants = {BASELINE: subjects.in_torch(model, x), "ONNX Runtime": lambda: in_ort(x)["boxes"]}
    timing = interleave(variants, options.rounds, options.warmup)
    rows = [{"network": name} | timing.row(variant, BASELINE) for variant in variants]
    rows[-1] |= found
    return [row | {"metadata": {"shape": shape, "samples": [str(s) for s in samples]}} for row in rows]


def compare(model: nn.Module, in_ort: Callable[[Tensor], Detections], images: list[Tensor]) -> Row:
    """Boxes of all images: how many there are, how many pair up, and how far the pairs are apart."""
    total: Row = {"images": len(images), "boxes": 0, "boxes_ort": 0, "matched": 0, "same_row": 0}
    apart, scores = [0.0], [0.0]
    for image in images:
        with torch.inference_mode():
            expected = model(image)
        actual = in_ort(image)
        pairs = match(actual, expected)
        total["boxes"] += int(expected["count"])
        total["boxes_ort"] += int(actual["count"])
        total["matched"] += len(pairs)
        total["same_row"] += sum(row == other for row, other in pairs)
        for row, other in pairs:
            apart.append(float((actual["boxes"][0, row] - expected["boxes"][0, other]).abs().max()))
            scores.append(float((actual["scores"][0, row] - expected["scores"][0, other]).abs()))
    return total | {"max_abs_box": max(apart), "max_abs_score": max(scores)}


def match(actual: Detections, expected: Detections) -> list[tuple[int, int]]:
    """Pairs (row of actual, row of expected) of one image's detections."""
    count, others = int(actual["count"]), int(expected["count"])
    both = torch.cat([actual["boxes"][0, :count], expected["boxes"][0, :others]])
    overlap = overlaps(both)[:count, count:]
    overlap[actual["labels"][0, :count, None] != expected["labels"][0, None, :others]] = -1
    pairs = []
    for row in range(count if others else 0):
        best, other = overlap[row].max(0)
        if best >= SMALLEST_OVERLAP:
            pairs.append((row, int(other)))
            overlap[:, other] = -1
    return pairs
