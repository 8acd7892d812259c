"""Check of the gates of a free-running ONNX artifact."""

from __future__ import annotations

import numpy as np

from scconv_deploy.gate.margins import count_free_flips
from scconv_deploy.graph import instrument
from scconv_deploy.records.parity import Check
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, other_shape
from scconv_deploy.verification.checks.gates import SiteFlips, gates_check
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.reference.run import ReferenceRun

NAME = "free-running gates"


class FreeRunning(ArtifactCheck):
    """Flips of the free-running artifact; a flip is explained by the error of its gate's input."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self.flips = SiteFlips()

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        for name, site in run.sites.items():
            decided, x = found.exposed.get(instrument.gate_output(name)), found.exposed.get(instrument.gate_input(name))
            if decided is None or x is None or site.x is None:
                continue  # the reason names the number of SRUs compared
            if decided.shape != site.mask.shape:
                self._shared.contract.note(other_shape(name, decided, site.mask))
                continue
            if not site.finite or not np.isfinite(x).all():
                whose = "artifact" if site.finite else "reference"
                self._shared.finite.note(f"the input of {name} in the {whose}", run)
                continue
            count = count_free_flips(site.mask, decided, site.x, x, site.site.form)
            self.flips.add(site.site, decided != site.mask, x, count)

    def checks(self) -> list[Check]:
        sites = self._shared.sites
        counts = sites.ordered(self.flips.counts)
        what = "running free, gates changed"
        return [gates_check(NAME, what, counts, self._shared.limits, sites.of_srus(counts))]
