"""Teacher-forced check of an engine: each SRU built alone, fed the recorded input, gates decoded from its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from scconv_deploy.errors import BuildError, MissingRuntimeError, ModelError
from scconv_deploy.gate.margins import decide
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact
from scconv_deploy.runtimes.tensorrt.runner import from_bfloat16, to_bfloat16
from scconv_deploy.verification.checks.gates import gates_check
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.engine.decode import decode
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

    Attributes:
        counts: flip counts by site.
    """

    def __init__(self, engine: EngineArtifact, models: SRUModels, build: SRUBuilder, shared: Shared) -> None:
        self._engine, self._models, self._build = engine, models, build
        self._shared = shared
        self.counts: dict[str, FlipCount] = {}
        self._apart: dict[str, float] = {}
        self._foreign: dict[str, int] = {}
        self._not_run: dict[str, str] = {}
        self._sites: set[str] = set()

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
        fed = _rounded(x, data)
        expected = run.mask if data == "float32" else decide(fed, site.form)
        with self._build(self._engine, site.name, models) as runner:
            (name,) = runner.inputs
            (y,) = runner.run({name: fed}).values()
        found = decode(y, fed, site, data)
        self.counts[site.name] = found.count(expected, fed, site)
        self._apart[site.name] = found.apart
        self._foreign[site.name] = int(found.foreign.sum()) // 2

    def checks(self) -> list[Check]:
        """Checks of gates and values, and of SRUs that could not be judged."""
        checks = [self._gates(), self._values()] if self._apart else []
        if self._sites and not self._apart:
            checks = [_unseen(f"none of the {len(self._sites)} SRUs was compared alone")]
        reasons: dict[str, list[str]] = {}
        for site, reason in self._not_run.items():
            reasons.setdefault(reason, []).append(site)
        for reason, sites in reasons.items():
            more = f" (and {len(sites) - 3} more)" if len(sites) > 3 else ""
            checks.append(Check("SRUs alone", "not run", f"{', '.join(sites[:3])}{more}: {reason}"))
        return checks

    def _gates(self) -> Check:
        counts = self._shared.sites.ordered(self.counts)
        hidden = sum(count.undecidable for count in counts.values())
        coverage = f"; {hidden:,} gates do not show in the output" if hidden else ""
        if not any(count.gates for count in counts.values()):
            return _unseen(f"{len(counts)} of {len(self._sites)} SRUs alone{coverage}")
        what = f"{len(counts)} SRUs alone, same input, gates changed"
        return gates_check(GATES, what, counts, self._shared.limits, coverage, self._named)

    def _named(self, name: str) -> str:
        path = self._shared.sites.gates[name].site.path
        return name if path == name else f"{name} ({path})"

    def _values(self) -> Check:
        tolerance = f"engine_sru.{self._engine.manifest.data_type}"
        limit = self._shared.limits[tolerance].value
        name, apart = max(self._apart.items(), key=lambda item: _badness(item[1]))
        decided = Quantity(tolerance, apart, limit)
        if decided.within:
            text = f"values of SRUs alone agree to {apart:.1e} relative L2 (limit {limit:.0e})"
            return Check("values of SRUs", "passed", text, (decided,))
        text = f"{self._named(name)} alone is {apart:.1e} from all that its input allows (limit {limit:.0e})"
        if self._foreign[name]:
            text += f": {self._foreign[name]:,} pairs of outputs that no gates explain"
        return Check("values of SRUs", "failed", text, (decided,))


def _unseen(why: str) -> Check:
    """Check of gates if none was compared; a required link then has not passed."""
    return Check(GATES, "not run", f"{why}: no gate was seen")


def _badness(value: float) -> float:
    return value if value == value else float("inf")


def _rounded(x: np.ndarray, data: str) -> np.ndarray:
    """Round x to an engine's type; float32."""
    if data == "bfloat16":
        return from_bfloat16(to_bfloat16(x))
    with np.errstate(over="ignore"):
        return x.astype(data).astype(np.float32)
