"""Draw the pictures of docs/gate.md: ``python docs/pictures.py``. Needs matplotlib and scikit-learn."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib import pyplot as plt

from scconv_deploy.gate.cut import tau
from scconv_deploy.model.prepare import reference_from_spec
from scconv_deploy.model.replay import record_gates
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.verification.preprocessing import Preprocessing
from scconv_deploy.verification.samples import load_samples

FOLDER = Path(__file__).parent / "pictures"
INK, OPEN, CLOSED = "#555555", "#1b7f4d", "#b3402a"
mpl.rcParams |= {
    "svg.hashsalt": "scconv", "svg.fonttype": "path", "font.size": 10, "text.color": INK, "axes.edgecolor": INK,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "savefig.transparent": True,
}  # fmt: skip


def step() -> None:
    """float32's sigmoid over consecutive float32 numbers around the threshold."""
    z = np.linspace(-4e-7, 4e-7, 801, dtype=np.float32)
    r = torch.sigmoid(torch.from_numpy(z)).numpy().astype(np.float64) - 0.5
    figure, axes = plt.subplots(figsize=(7, 3))
    axes.step(z, r, where="mid", color=INK, lw=1)
    opened = r >= 0
    axes.fill_between(z, r.min(), r.max(), where=opened, color=OPEN, alpha=0.12, lw=0, label="open: sigmoid(z) >= 0.5")
    axes.fill_between(z, r.min(), r.max(), where=~opened, color=CLOSED, alpha=0.12, lw=0, label="closed")
    axes.axvline(tau(0.5, ">="), color=OPEN, ls="--", lw=1, label=f"tau = {tau(0.5, '>='):.2g}")
    axes.axvline(0, color=INK, lw=0.5)
    axes.set(xlabel="z", ylabel="sigmoid(z) - 0.5")
    axes.legend(frameon=False, loc="lower right")
    _save(figure, "step.svg")


def data_path() -> None:
    """Where the halves go."""
    figure, axes = plt.subplots(figsize=(7, 2.6))
    axes.axis("off")
    axes.set(xlim=(0, 10), ylim=(0, 4))
    boxes = {
        "x": (0.2, 1.6, "x"), "gate": (2.0, 1.6, "centre, compare\nwith s * cut"),
        "x1": (4.8, 2.8, "x1 = open * x"), "x2": (4.8, 0.4, "x2 = x - x1"), "y": (8.3, 1.6, "y"),
    }  # fmt: skip
    for left, bottom, text in boxes.values():
        width = 0.9 if len(text) < 3 else 2.2
        axes.add_patch(plt.Rectangle((left, bottom), width, 0.8, fill=False, ec=INK))
        axes.text(left + width / 2, bottom + 0.4, text, ha="center", va="center")

    def arrow(start: tuple[float, float], end: tuple[float, float], color: str = INK, style: str = "-") -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": color, "ls": style})

    arrow((1.1, 2), (2, 2))
    arrow((4.2, 2.1), (4.8, 3.1), OPEN)
    arrow((4.2, 1.9), (4.8, 0.9), CLOSED)
    arrow((7, 3.3), (8.3, 2.3), OPEN)
    arrow((7, 0.7), (8.3, 1.7), CLOSED, "--")
    axes.text(7.75, 3.1, "halves as they are", color=OPEN, ha="left", fontsize=9)
    axes.text(7.75, 0.75, "halves exchanged", color=CLOSED, ha="left", fontsize=9)
    _save(figure, "data_path.svg")


def margins() -> None:
    """How near to their threshold the gates of a network live."""
    spec = ModelSpec("scconv_resnet20").resolved()
    reference, _ = reference_from_spec(spec)
    sample = list(load_samples("photos", reference.signature, Preprocessing.of(spec.source, reference.model)))[-1]
    distances, bounds = [], []
    for gate in record_gates(reference.swapped, reference.signature, sample.tensors)[1].values():
        found, spread = gate.swapped.gate.margins(gate.x), float(gate.x.std())
        distances.append((np.abs(found.margin) / spread).ravel())
        bounds.append((found.bound / spread).ravel())
    distance, bound = np.concatenate(distances), np.concatenate(bounds)
    figure, axes = plt.subplots(figsize=(7, 3))
    edges = np.logspace(-8, 1.5, 80)
    axes.hist(distance.clip(edges[0]), edges, color=INK, alpha=0.7, label=f"margins of {distance.size:,} gates")
    axes.hist(bound, edges, color=CLOSED, alpha=0.5, label="what rounding can move them by")
    axes.set(xscale="log", yscale="log", xlabel="in deviations of the SRU's input", ylabel="gates")
    axes.legend(frameon=False, loc="upper center")
    _save(figure, "margins.svg")


def _save(figure: plt.Figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / name, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    step()
    data_path()
    margins()
