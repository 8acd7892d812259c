"""State that the checks of one artifact share, an ONNX file's and an engine's. No onnx in it."""

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
    """What was run, and how many inputs of it were compared in full."""

    def __init__(self) -> None:
        self._batches: Counter[str] = Counter()
        self._inputs = self._in_full = 0

    def add(self, run: ReferenceRun) -> None:
        """Count a sample under what samples like it are called."""
        self._batches[run.kind or run.description] += 1
        self._inputs += run.count
        self._in_full += run.count if run.deep else 0

    @property
    def names(self) -> tuple[str, ...]:
        """What was run, and in how many batches."""
        return tuple(text if n == 1 else f"{text}, {n} batches" for text, n in self._batches.items())

    @property
    def coverage(self) -> str:
        """What to say of a check that the inputs which only ran free were not part of; "" if there are none."""
        return "" if self._inputs == self._in_full else f", on {self._in_full:,} of {self._inputs:,} inputs"


class Shared:
    """What the checks of one artifact share.

    Args:
        limits: the tolerances.
        data: the type of the artifact's data.

    Attributes:
        ruler: limits and noise.
        samples, sites: what the reference ran and its gates.
        contract, finite, answers: noted by several checks, and reported after all of them.
    """

    def __init__(self, limits: Table, data: np.dtype = FLOAT32) -> None:
        self.ruler = Ruler(limits, data)
        self.samples, self.sites = Samples(), Sites()
        self.contract, self.finite, self.answers = Contract(), Finite(), Answers()

    @property
    def limits(self) -> Table:
        return self.ruler.limits

    def checks(self) -> list[Check]:
        """What several checks noted."""
        return [*self.contract.checks(), *self.finite.checks(), *self.answers.checks()]
