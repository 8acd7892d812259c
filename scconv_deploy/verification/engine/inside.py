"""Check of the SRUs inside an engine, each on the engine's own input. NumPy only.

An engine that was built with ``--debug-tensors srus`` shows the input x and the output y of its SRUs. Each y is held
against the gate applied to that very x, so no error of the layers before counts. The gates are decoded from y
(:mod:`.decode`), as of SRUs alone (:mod:`.srus`); these are the SRUs of the whole engine, as it was fused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scconv_deploy.gate.margins import decide
from scconv_deploy.records.parity import Check
from scconv_deploy.runtimes.tensorrt.engine import EngineManifest
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.engine.readings import Readings, readings_gates, readings_values
from scconv_deploy.verification.engine.srus import not_run, rounded
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, eq=False)
class Ends:
    """Input x and output y of one SRU of an engine, float32 ``[N, C, H, W]`` each, exact."""

    x: np.ndarray
    y: np.ndarray


class InsideSRUs:
    """Collector of gates and values of the SRUs inside an engine.

    Attributes:
        watched: debug tensors that must be shown; empty if the engine was built without.
    """

    def __init__(self, manifest: EngineManifest, shared: Shared) -> None:
        self._manifest, self._shared = manifest, shared
        self._names: dict[str, dict[str, str]] = {}
        for tensor in manifest.debug_tensors:
            self._names.setdefault(tensor.site, {})[tensor.side] = tensor.name
        outer = {tensor.name for tensor in (*manifest.inputs, *manifest.outputs)}
        self.watched = tuple(dict.fromkeys(t.name for t in manifest.debug_tensors if t.name not in outer))
        self._readings = Readings(manifest.data_type, "inside the engine", shared)
        self._unread: dict[str, str] = {}

    def ends(self, run: ReferenceRun, found: Arrays, shown: Arrays) -> dict[str, Ends]:
        """Ends of the SRUs on one sample, by site in the reference's order; an SRU that cannot be read is missing.

        Args:
            found: the engine's outputs.
            shown: its debug tensors.
        """
        kinds = {tensor.name: _DTYPES[tensor.dtype] for tensor in self._manifest.inputs if tensor.dtype in _DTYPES}
        given = {name: rounded(run.inputs[name], kind) for name, kind in kinds.items()}
        tensors: Mapping[str, np.ndarray] = {**given, **found, **shown}
        ends = {}
        for name, site in run.sites.items():
            names = self._names.get(name, {})
            x, y = (tensors.get(names.get(side, "")) for side in ("x", "y"))
            if len(names) < 2:
                self._unread[name] = "the library did not mark its ends when it built the engine"
            elif x is None or y is None:
                self._unread[name] = "the library did not show its ends when it ran the engine"
            elif x.shape != site.mask.shape or y.shape != site.mask.shape:
                self._unread[name] = f"its ends are {x.shape} and {y.shape}, in PyTorch they are {site.mask.shape}"
            else:
                ends[name] = Ends(x.astype(np.float32), y.astype(np.float32))
        return ends

    def add(self, run: ReferenceRun, ends: Mapping[str, Ends]) -> None:
        """Hold each SRU's output against what its gate allows for its input."""
        for name, end in ends.items():
            if not np.isfinite(end.x).all():
                self._shared.finite.note(f"the engine's input of {name}", run)
                continue
            site = run.sites[name].site
            self._readings.add(site, end.y, end.x, decide(end.x, site.form))

    def checks(self) -> list[Check]:
        """Checks of gates and values, and of SRUs that could not be read; empty for an engine built without."""
        if not self._manifest.debug_tensors:
            return []
        checks = []
        if self._readings.apart:
            checks.append(readings_gates("gates inside", self._readings, f"{len(self._readings.apart)} SRUs inside"))
            checks.append(readings_values("values inside", self._readings))
        return [*checks, *not_run("SRUs inside", self._unread)]
