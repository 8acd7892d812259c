"""An image with the detections of reference and artifact on it."""

from __future__ import annotations

import base64
import io

from matplotlib.axes import Axes
from matplotlib.image import imread
from matplotlib.patches import Rectangle

from scconv_deploy.records.accuracy import ExampleBox, ExampleImage
from scconv_deploy.report.escaping import visible

CAPTION = (
    "Detections with a score of at least 0.25: the reference's (blue, solid) and the artifact's (red, dashed), on the "
    "labelled images where they differ most."
)


def draw_example(axes: Axes, example: ExampleImage, colours: tuple[str, str]) -> None:
    """Draw an example.

    Args:
        colours: of the reference and of the artifact.
    """
    axes.imshow(imread(io.BytesIO(base64.b64decode(example.jpeg)), format="jpg"))
    axes.axis("off")
    for boxes, colour, style in zip((example.reference, example.artifact), colours, ("-", "--"), strict=True):
        for box in boxes:
            _draw(axes, box, colour, style)


def _draw(axes: Axes, box: ExampleBox, colour: str, style: str) -> None:
    axes.add_patch(
        Rectangle(
            (box.left, box.top), box.right - box.left, box.bottom - box.top, fill=False, ec=colour, ls=style, lw=1.2
        )
    )
    low = style != "-"
    axes.text(
        box.left, box.bottom if low else box.top, visible(f"{box.label} {box.score:.2f}"), color=colour, size=6,
        va="top" if low else "bottom", clip_on=True, bbox={"fc": "white", "alpha": 0.7, "lw": 0, "pad": 0.5},
    )  # fmt: skip
