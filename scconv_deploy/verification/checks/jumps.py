"""Errors within the reference's own jumps, where not every gate could be fixed in the replay: no verdict."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.other_gates import Jumped
from scconv_deploy.graph import gates as onnx_gates
from scconv_deploy.records.parity import Check
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRuns
from scconv_deploy.verification.checks.other_gates import OtherGates
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.reference.run import ReferenceRun, ReferenceSource
from scconv_deploy.verification.ruler import AgainstNoise


class Jumps(ArtifactCheck):
    """Check that excuses errors within the reference's jumps and reports them without a verdict."""

    def __init__(self, source: ReferenceSource, shared: Shared, runs: ArtifactRuns, others: OtherGates) -> None:
        self._source, self._shared, self._runs, self._others = source, shared, runs, others
        self._loose = onnx_gates.loose(runs.proto, {one.codes for one in runs.quantizers.values()})
        self._noisy: set[str] = set()  # outputs whose float64 run jumped too
        self._jumped: dict[str, Jumped] = {}
        self._sizes: tuple[ReferenceRun, Mapping[str, float]] | None = None

    def floor(self, run: ReferenceRun, name: str) -> float | None:
        """Noise floor of an output; None (assumed) if the float64 run jumped as the reference does on inputs moved by
        rounding."""
        floor, ruler = run.floors[name], self._shared.ruler
        largest = ruler.limits[ruler.largest_floor(run.outputs[name].dtype)].value
        if floor is None or floor <= largest or not self._explains(run, name, floor):
            return floor
        self._noisy.add(name)
        return None

    def excuse(self, run: ReferenceRun, name: str, found: AgainstNoise) -> bool:
        """Whether an error is within the reference's own jumps, where not every gate could be fixed.

        An error beyond its limit is recorded. The limit grows with the number of values compared: the last one decides.

        Args:
            name: name of an output, or site of an SRU whose input differs.
        """
        if found.ratio <= self._shared.ruler.largest_multiple(found.multiple):
            return False
        ratio = found.ratio if found.ratio == found.ratio else math.inf
        kept = self._jumped.setdefault(name, Jumped(found.multiple))
        if not self.may_jump(run, name) or not self._explains(run, name, found.error):
            kept.beyond = max(kept.beyond, ratio)
            return False
        if ratio > kept.ratio:
            kept.ratio, kept.words = ratio, self._words(run, found.error)
        return True

    def may_jump(self, run: ReferenceRun, name: str) -> bool:
        """Whether gates that are not fixed in the replay of this sample may move an output, or an SRU's input."""
        others = self._others
        return bool(others.unfound or self._loose or others.untaken or self._unread(run) or name in self._noisy)

    def _unread(self, run: ReferenceRun) -> list[str]:
        """SRUs without a node in the artifact, whose gates are therefore not fixed."""
        redundant = self._shared.sites.redundant
        return [name for name in run.sites if name not in self._runs.nodes and name not in redundant]

    def _explains(self, run: ReferenceRun, name: str, error: float) -> bool:
        if self._sizes is None or self._sizes[0] is not run:
            try:
                free = [*(n for n in self._others.unfound if n in run.others), *self._unread(run)]
                sizes = self._source.jumps(run, free, self._shared.ruler.data.name)
            except ModelError:  # the reference file refuses the inputs
                sizes = {}
            self._sizes = run, sizes
        size = self._sizes[1].get(name, 0.0)
        return bool(np.isfinite(size)) and error <= self._shared.limits["jump_multiple"].value * size

    def _words(self, run: ReferenceRun, error: float) -> str:
        where = [f"{name} ({reason})" for name, reason in self._others.unfound.items()]
        where += [f"{name} (an SRU without a node)" for name in self._unread(run)] + self._loose + self._others.untaken
        where = where or ["it changes as much on inputs off by rounding, and no gate is known to do it"]
        more = f" and {len(where) - 3} more" if len(where) > 3 else ""
        return f"differs by {error:.1e}; the model jumps at places that cannot be fixed: {', '.join(where[:3])}{more}"

    def undecided(self, name: str) -> str:
        """Reason why an output or an SRU's input has no verdict; "" if it has one."""
        jumped = self._jumped.get(name)
        if jumped is None or not jumped.undecided(self._shared.ruler.largest_multiple(jumped.multiple)):
            return ""
        return f"{name} {jumped.words}"

    def checks(self) -> list[Check]:
        found = [words for name in self._jumped if (words := self.undecided(name))]
        return [Check("jumps", "not run", "; ".join(found))] if found else []
