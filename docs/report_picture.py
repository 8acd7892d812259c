"""Draw docs/report.png: ``python docs/report_picture.py``. Needs Chromium (or Chrome), Pillow and scikit-learn.

A report as its readers see it, at a desk's and at a phone's width. The artifact is ScConv-ResNet-20 with the thresholds
of one SRU moved by 1e-3, judged on seeded noise and on the two photographs.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
from onnx import numpy_helper
from PIL import Image

PICTURE = Path(__file__).parent / "report.png"
SITE = "layer2.1.conv2.SRU"
DESK, PHONE, HEIGHT, GAP = 1280, 390, 1500, 24
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def make_report(folder: Path) -> Path:
    """The page of a damaged artifact."""
    healthy, damaged, page = folder / "healthy.onnx", folder / "damaged.onnx", folder / "report.html"
    command = [sys.executable, "-m", "scconv_deploy"]
    subprocess.run(
        [*command, "export", "scconv_resnet20", "--batch", "1:2:8", "-o", healthy.name], cwd=folder, check=True
    )
    model = onnx.load(healthy)
    (node,) = [node for node in model.graph.node if node.name == SITE]
    (cut,) = [tensor for tensor in model.graph.initializer if tensor.name == node.input[1]]
    cut.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(cut) + 1e-3, cut.name))
    onnx.save(model, damaged)
    judge = [*command, "verify", damaged.name, "--reference", "scconv_resnet20", "--batch", "1:2:8", "--data", "photos"]
    done = subprocess.run([*judge, "--report", page.name], cwd=folder, check=False)
    if done.returncode != 6:
        raise SystemExit(f"verify ended with {done.returncode}, expected 6: the artifact is damaged")
    return page


def photograph(page: Path, width: int) -> Image.Image:
    """The top of a page as a browser draws it."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"No browser was found; install one of {', '.join(BROWSERS)}.")
    with tempfile.TemporaryDirectory() as profile:
        shot = Path(profile) / "shot.png"
        size = [f"--window-size={width},{HEIGHT}", f"--user-data-dir={profile}", f"--screenshot={shot}"]
        subprocess.run([browser, *QUIET, *size, page.resolve().as_uri()], check=True, capture_output=True)
        return Image.open(shot).convert("RGB")


def main() -> None:
    """Make the report, and both pictures of it side by side."""
    with tempfile.TemporaryDirectory() as folder:
        page = make_report(Path(folder))
        left, right = photograph(page, DESK), photograph(page, PHONE)
    both = Image.new("RGB", (DESK + GAP + PHONE, HEIGHT), "#888888")
    both.paste(left, (0, 0))
    both.paste(right, (DESK + GAP, 0))
    both.quantize(128, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main()
