"""Outputs of another shape or type than the reference's, and NaN or Inf: what is not compared, and fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from scconv_deploy.records.parity import Check
from scconv_deploy.verification.reference.run import ReferenceRun

_NAMED_NON_FINITE = 8


class Contract:
    """Tensors of another shape or type than the reference's, and how often each came."""

    def __init__(self) -> None:
        self._broken: Counter[str] = Counter()

    def note(self, text: str) -> None:
        """Count a tensor, in words."""
        self._broken[text] += 1

    def checks(self) -> list[Check]:
        """Shape, type and order of the outputs."""
        return [Check("contract", "failed", _repeated(self._broken))] if self._broken else []


class Finite:
    """Tensors with NaN or Inf, and how often.

    Attributes:
        found: by the tensor's name and the sample's.
    """

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()

    def add(self, run: ReferenceRun) -> None:
        """Take over what the reference itself has."""
        self.found.update(run.non_finite)

    def note_input(self, site: str) -> None:
        """Count an SRU whose recorded input is not finite."""
        self.found[f"the input of {site}"] += 1

    def note(self, tensor: str, run: ReferenceRun) -> None:
        """Count a tensor; only the first samples are named, so that no report grows with the data."""
        where = run.sample if len(self.found) < _NAMED_NON_FINITE else run.kind or run.sample
        self.found[f"{tensor} on {where}"] += 1

    def note_output(self, name: str, run: ReferenceRun, y: np.ndarray, whose: str) -> None:
        """Count an output, on whichever sides it is not finite; ``whose`` is y, the other is the reference's."""
        for side, values in (("reference", run.given[name]), (whose, y)):
            if not np.isfinite(values).all():
                self.note(f"the {side}'s output {name}", run)

    def checks(self) -> list[Check]:
        """NaN and Inf by the tensors' names."""
        if not self.found:
            return []
        return [Check("finite", "failed", f"NaN or Inf in {_repeated(self.found)}; not compared")]


def _repeated(messages: Mapping[str, int]) -> str:
    """Each message once, with how often it came."""
    return "; ".join(f"{text} ({count} times)" if count > 1 else text for text, count in messages.items())
