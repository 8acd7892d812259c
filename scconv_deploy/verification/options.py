"""Options of verification: data, tolerances, provider."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from scconv_deploy.runtimes.onnxruntime import CPU, RuntimeOptions
from scconv_deploy.verification.onnx.chain import Judging

if TYPE_CHECKING:
    from scconv_deploy.model.prepare import Reference
    from scconv_deploy.verification.onnx.shards import DataShards
    from scconv_deploy.verification.preprocessing import Preprocessing
    from scconv_deploy.verification.samples import Sample
    from scconv_deploy.workers.tasks import Workers

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
        operators: library of the fused SRU for CPUs, judged as a link of its own; None without that link.
        deep: number of inputs of the data that are judged in full; the others run free, at less than half the cost.
        workers: processes for the others; None runs them in this one.
    """

    data: str | None = None
    preprocessing: Preprocessing | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)
    provider: str = CPU
    deep: int = DEEP
    operators: Path | None = None
    workers: Workers | None = None

    @property
    def judging(self) -> Judging:
        return Judging(self.tolerances, RuntimeOptions(self.provider), self.operators)

    def samples(self, reference: Reference, seed: int, source: str = "") -> list[Iterable[Sample]]:
        """Seeded noise, then the user's data; ``source`` names a zoo model, for its preprocessing."""
        from scconv_deploy.verification.preprocessing import Preprocessing
        from scconv_deploy.verification.samples import load_samples, noise_samples

        samples: list[Iterable[Sample]] = [noise_samples(reference.signature, seed)]
        if self.data:
            preprocessing = self.preprocessing or Preprocessing.of(source, reference.model)
            samples.append(load_samples(self.data, reference.signature, preprocessing, self.deep, reference.checkpoint))
        return samples

    def shared_out(
        self, samples: Sequence[Iterable[Sample]], progress: Callable[[str], None]
    ) -> tuple[list[Iterable[Sample]], DataShards | None]:
        """Samples for this process, and those that run free for others; None if there are no workers, or no such."""
        from scconv_deploy.verification.onnx.shards import DataShards, most_parts
        from scconv_deploy.verification.samples import Samples

        if self.workers is None or not isinstance(samples[-1], Samples):
            return list(samples), None
        deep, parts = samples[-1].split(most_parts(samples[-1].rows, self.workers.jobs))
        if len(parts) < 2:
            return list(samples), None
        return [*samples[:-1], *deep], DataShards(parts, self.workers, progress)
