"""Checks of shapes, types and finite values: such tensors cannot be compared, and fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from scconv_deploy.records.parity import Check
from scconv_deploy.verification.reference.run import ReferenceRun

_NAMED_NON_FINITE = 8


class Contract:
    """Check of shapes and types: tensors that differ from the reference's, each with a count."""

    def __init__(self) -> None:
        self._broken: Counter[str] = Counter()

    def note(self, text: str) -> None:
        """Count a tensor, described as text."""
        self._broken[text] += 1

    def merge(self, other: Contract) -> None:
        """Add what was found on other samples."""
        self._broken.update(other._broken)

    def checks(self) -> list[Check]:
        """Check of the shapes, types and order of the outputs."""
        return [Check("contract", "failed", _repeated(self._broken))] if self._broken else []


class Finite:
    """Check for NaN and Inf.

    Attributes:
        found: number of times by tensor and sample, described as text.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._of_kind: dict[str, str] = {}  # text that names a sample -> text that names its kind

    def add(self, run: ReferenceRun) -> None:
        """Count the tensors with NaN or Inf in the reference."""
        self.found.update(run.non_finite)

    def note_input(self, site: str) -> None:
        """Count an SRU whose recorded input is not finite."""
        self.found[f"the input of {site}"] += 1

    def note(self, tensor: str, run: ReferenceRun) -> None:
        """Count a tensor; only the first samples are named, so that the report does not grow with the data."""
        named, of_kind = f"{tensor} on {run.sample}", f"{tensor} on {run.kind or run.sample}"
        self._count(named, of_kind, 1)

    def _count(self, named: str, of_kind: str, times: int) -> None:
        if len(self.found) < _NAMED_NON_FINITE:
            self._of_kind[named] = of_kind
            self.found[named] += times
        else:
            self.found[of_kind] += times

    def merge(self, other: Finite) -> None:
        """Add what was found on later samples, named as if they had been added here."""
        for text, times in other.found.items():
            self._count(text, other._of_kind.get(text, text), times)

    def note_output(self, name: str, run: ReferenceRun, y: np.ndarray, whose: str) -> None:
        """Count an output on each side that is not finite; ``whose`` names the side of y."""
        for side, values in (("reference", run.given[name]), (whose, y)):
            if not np.isfinite(values).all():
                self.note(f"the {side}'s output {name}", run)

    def checks(self) -> list[Check]:
        """Failed check that names the tensors with NaN or Inf; empty without any."""
        if not self.found:
            return []
        return [Check("finite", "failed", f"NaN or Inf in {_repeated(self.found)}; not compared")]


def _repeated(messages: Mapping[str, int]) -> str:
    """Each message once, with its count."""
    return "; ".join(f"{text} ({count} times)" if count > 1 else text for text, count in messages.items())
