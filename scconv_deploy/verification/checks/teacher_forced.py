"""Check of the teacher-forced gates of an ONNX artifact: each SRU on the reference's input."""

from __future__ import annotations

import numpy as np

from scconv_deploy.gate.margins import count_flips, decide
from scconv_deploy.graph import instrument
from scconv_deploy.records.parity import Check
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, ArtifactRuns
from scconv_deploy.verification.checks.gates import SiteFlips, gates_check
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.reference.run import ReferenceRun, SiteRun
from scconv_deploy.verification.ruler import FLOAT32

NAME = "teacher-forced gates"


class TeacherForced(ArtifactCheck):
    """Teacher-forced flips of the artifact."""

    def __init__(self, shared: Shared, runs: ArtifactRuns) -> None:
        self._shared, self._runs = shared, runs
        self._unfed: set[str] = set()
        self.flips = SiteFlips()

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        for name, site in run.sites.items() if run.deep else ():
            if site.x is None:
                self._unfed.add(name)
            elif not site.finite:
                self._shared.finite.note_input(name)
            elif (runner := self._runs.probe(name)) is not None:
                x, expected = self._as_data(site, site.x)
                differs = runner.run({instrument.PROBE_X: x})[instrument.PROBE_OPEN] != expected
                self.flips.add(site.site, differs, x, count_flips(differs, x, site.site.form))

    def _as_data(self, site: SiteRun, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The reference's gate input in the artifact's type, and the right mask for it."""
        data = self._shared.ruler.data
        if data == FLOAT32:
            return x, site.mask
        with np.errstate(over="ignore"):
            x = x.astype(data).astype(np.float32)
        return x, decide(x, site.site.form)

    def checks(self) -> list[Check]:
        sites = self._shared.sites
        counts, coverage = sites.ordered(self.flips.counts), self._shared.samples.coverage
        unfed = [name for name in sites.gates if name in self._unfed and name not in counts]
        if unfed and not counts:
            return [Check(NAME, "not run", "the reference kept no input of an SRU")]
        if unfed:
            coverage += f", on {len(counts)} of {len(sites.gates)} SRUs: the reference kept no input of the others"
        else:
            coverage += sites.of_srus(counts)
        return [gates_check(NAME, "same input, gates changed", counts, self._shared.limits, coverage)]
