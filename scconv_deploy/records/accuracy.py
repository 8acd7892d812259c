"""Accuracy of artifact and reference on labelled data, and images on which they differ most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ExampleBox:
    """A detection in an example: corners in the thumbnail's pixels, its class and its score."""

    left: float
    top: float
    right: float
    bottom: float
    label: str
    score: float


@dataclass(frozen=True)
class ExampleImage:
    """An image on which artifact and reference differ, with what both detect in it.

    Attributes:
        name: name of the file.
        jpeg: a small copy of it, base64.
        reference, artifact: detections with a score of at least 0.25, at most 20.
    """

    name: str
    jpeg: str
    reference: tuple[ExampleBox, ...]
    artifact: tuple[ExampleBox, ...]


@dataclass(frozen=True)
class Accuracy:
    """The task's metric on labelled data, and a paired interval for the difference (artifact - reference).

    Attributes:
        samples: number of labelled inputs.
        reference, artifact: the metric of both, 0 to 1.
        difference: artifact - reference.
        low, high, confidence: the interval of the difference.
        metric: what is measured.
        method: how the interval was made.
        background: images without a label file, which count as showing nothing.
        examples: images on which the two differ most, the worst first.
    """

    samples: int
    reference: float
    artifact: float
    difference: float
    low: float
    high: float
    confidence: float
    metric: Literal["top-1", "mAP50-95", "mIoU"] = "top-1"
    method: str = "Newcombe's score interval for paired proportions"
    background: int = 0
    examples: tuple[ExampleImage, ...] = ()

    @property
    def name(self) -> str:
        """Name of the metric in a sentence."""
        return "accuracy" if self.metric == "top-1" else self.metric

    @property
    def note(self) -> str:
        """What else must be known of the data; "" if nothing."""
        if not self.background:
            return ""
        what = "1 image has" if self.background == 1 else f"{self.background:,} images have"
        return f"{what} no label file and count as background"
