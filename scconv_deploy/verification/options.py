"""Options of verification: data, tolerances, provider."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from scconv_deploy.runtimes.onnxruntime import CPU, RuntimeOptions
from scconv_deploy.verification.onnx.chain import Judging

if TYPE_CHECKING:
    from scconv_deploy.model.prepare import Reference
    from scconv_deploy.verification.samples import Preprocessing, Sample

DEEP = 64
"""Default number of inputs of the data that are judged in full: half a minute of ScConv-ResNet-50."""

DEEP_INT8 = 8
"""The same for a quantised file, of which a row costs about three times as much: its codes are gates too."""


@dataclass(frozen=True)
class Checks:
    """Options of verification.

    Attributes:
        data: source of real data beside the seeded noise, see :func:`.samples.load_samples`.
        preprocessing: preprocessing of images; None takes the model's own.
        tolerances: values by name that replace the table's (:data:`.tolerances.ALL`); the report prints them.
        provider: execution provider of ONNX Runtime.
        deep: number of inputs of the data that are judged in full; the others run free, at less than half the cost.
    """

    data: str | None = None
    preprocessing: Preprocessing | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    provider: str = CPU
    deep: int = DEEP

    @property
    def judging(self) -> Judging:
        return Judging(self.tolerances, RuntimeOptions(self.provider))

    def samples(self, reference: Reference, seed: int, source: str = "") -> list[Iterable[Sample]]:
        """Seeded noise, then the user's data; ``source`` names a zoo model, for its preprocessing."""
        from scconv_deploy.verification.samples import Preprocessing, load_samples, noise_samples

        samples: list[Iterable[Sample]] = [noise_samples(reference.signature, seed)]
        if self.data:
            preprocessing = self.preprocessing or Preprocessing.of(source, reference.model)
            samples.append(load_samples(self.data, reference.signature, preprocessing, self.deep, reference.checkpoint))
        return samples
