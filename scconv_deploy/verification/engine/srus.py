"""Teacher-forced check of an engine: each SRU built alone, fed the recorded input, gates decoded from its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from scconv_deploy.errors import BuildError, MissingRuntimeError, ModelError
from scconv_deploy.gate.margins import decide
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact
from scconv_deploy.runtimes.tensorrt.runner import from_bfloat16, to_bfloat16
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.engine.readings import Readings, readings_gates, readings_values
from scconv_deploy.verification.engine.sru_alone import Form
from scconv_deploy.verification.reference.run import Site, SiteRun

Models = Mapping[Form, bytes]
SRUModels = Callable[[Site, tuple[int, ...]], Models]
"""The ONNX model of a site for an x of this shape, in each form; empty where there is none."""
SRUBuilder = Callable[[EngineArtifact, str, Models], AbstractContextManager[Any]]
"""Builds a site's models as the engine was built, and runs them."""
GATES = "teacher-forced gates"
"""Name of the check of gates."""


class LoneSRUs:
    """Collector of gates and values of SRUs built alone.

    Args:
        models, build: see :data:`SRUModels` and :data:`SRUBuilder`.
    """

    def __init__(self, engine: EngineArtifact, models: SRUModels, build: SRUBuilder, shared: Shared) -> None:
        self._engine, self._models, self._build = engine, models, build
        self._shared = shared
        self._readings = Readings(engine.manifest.data_type, "alone", shared)
        self._not_run: dict[str, str] = {}
        self._sites: set[str] = set()

    @property
    def counts(self) -> Mapping[str, FlipCount]:
        """Flip counts by site."""
        return self._readings.counts

    def judge(self, run: SiteRun) -> None:
        """Build one SRU, run it on the recorded input, and compare."""
        name = run.site.name
        self._sites.add(name)
        if run.x is None:
            self._not_run[name] = "its input was not recorded"
        elif not np.isfinite(run.x).all():
            self._shared.finite.note_input(name)
        elif not (models := self._models(run.site, run.x.shape)):
            self._not_run[name] = "there is no ONNX model of it alone"
        else:
            try:
                self._run(run, run.x, models)
            except (BuildError, MissingRuntimeError, ModelError) as error:  # no verdict on what it computes
                self._not_run[name] = error.message

    def _run(self, run: SiteRun, x: np.ndarray, models: Models) -> None:
        site, data = run.site, self._engine.manifest.data_type
        fed = rounded(x, data)
        expected = run.mask if data == "float32" else decide(fed, site.form)
        with self._build(self._engine, site.name, models) as runner:
            (name,) = runner.inputs
            (y,) = runner.run({name: fed}).values()
        self._readings.add(site, y, fed, expected)

    def checks(self) -> list[Check]:
        """Checks of gates and values, and of SRUs that could not be judged."""
        checks = []
        if self._readings.apart:
            seen = f"{len(self.counts)} of {len(self._sites)} SRUs alone"
            checks = [
                readings_gates(GATES, self._readings, seen),
                readings_values("values of SRUs", self._readings),
            ]
        elif self._sites:
            why = f"none of the {len(self._sites)} SRUs was compared alone: no gate was seen"
            checks = [Check(GATES, "not run", why)]
        return [*checks, *not_run("SRUs alone", self._not_run)]


def not_run(name: str, reasons: Mapping[str, str]) -> list[Check]:
    """Checks of SRUs that were not judged, one a reason, from site -> reason."""
    sites_of: dict[str, list[str]] = {}
    for site, reason in reasons.items():
        sites_of.setdefault(reason, []).append(site)
    checks = []
    for reason, sites in sites_of.items():
        more = f" (and {len(sites) - 3} more)" if len(sites) > 3 else ""
        checks.append(Check(name, "not run", f"{', '.join(sites[:3])}{more}: {reason}"))
    return checks


def rounded(x: np.ndarray, data: str) -> np.ndarray:
    """Round x to an engine's type; float32."""
    if data == "bfloat16":
        return from_bfloat16(to_bfloat16(x))
    with np.errstate(over="ignore"):
        return x.astype(data).astype(np.float32)
