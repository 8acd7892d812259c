"""State shared by the checks of one artifact, ONNX file or engine. No onnx: it also runs on the device."""

from __future__ import annotations

from collections import Counter

import numpy as np

from scconv_deploy.records.parity import Check
from scconv_deploy.records.tolerances import Table
from scconv_deploy.verification.checks.answers import Answers
from scconv_deploy.verification.checks.contract import Contract, Finite
from scconv_deploy.verification.checks.gates import Sites
from scconv_deploy.verification.reference.run import ReferenceRun
from scconv_deploy.verification.ruler import FLOAT32, Ruler


class Samples:
    """Samples that were run, and the number of inputs compared in full."""

    def __init__(self) -> None:
        self._batches: Counter[str] = Counter()
        self._inputs = self._in_full = 0

    def add(self, run: ReferenceRun) -> None:
        """Count a sample under the name of its kind."""
        self._batches[run.kind or run.description] += 1
        self._inputs += run.count
        self._in_full += run.count if run.deep else 0

    def merge(self, other: Samples) -> None:
        """Add later samples."""
        self._batches.update(other._batches)
        self._inputs += other._inputs
        self._in_full += other._in_full

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the samples, with the number of batches."""
        return tuple(text if n == 1 else f"{text}, {n} batches" for text, n in self._batches.items())

    @property
    def coverage(self) -> str:
        """End of a reason: number of inputs compared in full; "" if all were."""
        return "" if self._inputs == self._in_full else f", on {self._in_full:,} of {self._inputs:,} inputs"


class Shared:
    """State shared by the checks of one artifact.

    Args:
        limits: table of tolerances.
        data: dtype of the artifact's data.

    Attributes:
        ruler: limits and noise.
        samples, sites: samples that were run, and the reference's SRUs.
        contract, finite, answers: findings of several checks, reported after all of them.
    """

    def __init__(self, limits: Table, data: np.dtype = FLOAT32) -> None:
        self.ruler = Ruler(limits, data)
        self.samples, self.sites = Samples(), Sites()
        self.contract, self.finite, self.answers = Contract(), Finite(), Answers()

    @property
    def limits(self) -> Table:
        return self.ruler.limits

    def checks(self) -> list[Check]:
        """Checks of ``contract``, ``finite`` and ``answers``."""
        return [*self.contract.checks(), *self.finite.checks(), *self.answers.checks()]
