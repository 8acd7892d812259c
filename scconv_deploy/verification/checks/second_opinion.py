"""Check of an ONNX artifact's SRUs in onnx.reference: gates and values on small inputs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.margins import count_flips
from scconv_deploy.graph import instrument
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.runtimes.onnx_reference import OnnxReferenceRunner
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, ArtifactRuns
from scconv_deploy.verification.checks.gates import gates_check
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.metrics import relative_l2
from scconv_deploy.verification.reference.run import ReferenceRun, ReferenceSource, Site
from scconv_deploy.verification.ruler import FLOAT32

NAME = "second opinion"
_SIZE = 8
"""Height and width to which an SRU's input is cropped: onnx.reference is a hundred times slower."""


class SecondOpinion(ArtifactCheck):
    """Flips and distance of each SRU in onnx.reference, on the first sample with an input of the SRU.

    Attributes:
        opinions: flips and relative L2 of the values, by site.
    """

    def __init__(self, source: ReferenceSource, shared: Shared, runs: ArtifactRuns) -> None:
        self._source, self._shared, self._runs = source, shared, runs
        self._asked: set[str] = set()
        self._refusal = ""
        self.opinions: dict[str, tuple[FlipCount, float]] = {}

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        for name, site in run.sites.items() if run.deep else ():
            if site.x is None or not site.finite or name in self._asked:
                continue
            self._asked.add(name)
            probe = self._runs.probe_model(name)
            if probe is not None:
                self._ask(probe, site.site, site.x)

    def _ask(self, probe: onnx.ModelProto, site: Site, x: np.ndarray) -> None:
        if self._shared.ruler.data != FLOAT32:
            self._refusal = f"an SRU alone in PyTorch is float32; the artifact's data are {self._shared.ruler.data}"
            return
        x = np.ascontiguousarray(x[:1, :, :_SIZE, :_SIZE])
        if x[0].size % site.form.num_groups or x[0].size == site.form.num_groups:
            return
        expected = self._source.sru(site, x)
        if expected is None:
            self._refusal = "this reference cannot compute an SRU for another input"
            return
        y, mask = expected
        try:
            with OnnxReferenceRunner(probe) as runner:
                found = runner.run({instrument.PROBE_X: x})
        except ModelError as error:
            self._refusal = error.message
            return
        differs = found[instrument.PROBE_OPEN] != mask
        half = x.shape[1] // 2
        touched = differs | np.roll(differs, half, axis=1)  # a gate shows in both channels of its pair
        apart = relative_l2(np.where(touched, y, found[instrument.PROBE_Y]), y)
        self.opinions[site.name] = (count_flips(differs, x, site.form), apart)

    def checks(self) -> list[Check]:
        sites, limits = self._shared.sites, self._shared.limits
        asked = sites.ordered(self.opinions)
        if not asked:
            return [Check(NAME, "not run", self._refusal)] if self._refusal else []
        counts = {name: count for name, (count, _) in asked.items()}
        check = gates_check(NAME, "onnx.reference, gates changed", counts, limits, sites.of_srus(counts))
        worst, (_, apart) = max(asked.items(), key=lambda item: item[1][1])
        limit = limits["second_opinion"].value
        decided = (*check.quantities, Quantity("second_opinion", apart, limit))
        if check.status == "failed" or decided[-1].within:
            return [replace(check, quantities=decided)]
        reason = f"onnx.reference: values of {worst} are {apart:.1e} apart (limit {limit:.0e})"
        return [Check(NAME, "failed", reason, decided)]
