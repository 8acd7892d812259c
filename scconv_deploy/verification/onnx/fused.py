"""Verdict on an ONNX artifact in ONNX Runtime with the fused SRU for CPUs, which shows no gate. No torch.

As with an engine's plugin, gates are decoded from x and y (:mod:`..engine.decode`): of each SRU alone, fed the
reference's x, and of the SRUs of the whole session, each on its own x. The session's outputs, running free, are judged
end to end, and the segments between its SRUs from its own tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from scconv_deploy.gate.margins import decide
from scconv_deploy.graph import instrument
from scconv_deploy.graph.forms import without_functions
from scconv_deploy.graph.types import data_type, precision_of, quantization_of
from scconv_deploy.records.parity import Check
from scconv_deploy.records.tolerances import Table
from scconv_deploy.runtimes.half import HalfRunner, runs_here
from scconv_deploy.runtimes.onnxruntime import CPU, OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification import sru_models
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.engine.inside import Ends
from scconv_deploy.verification.engine.outputs import EndToEnd
from scconv_deploy.verification.engine.readings import Readings, readings_gates, readings_values
from scconv_deploy.verification.engine.segments import Segments
from scconv_deploy.verification.engine.srus import not_run, rounded
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun, ReferenceSource, SiteRun

FUSED_LINK = "onnxruntime+fused"
_GATES = "teacher-forced gates"
_Runner = OnnxRuntimeRunner | HalfRunner


class FusedSRUs:
    """Collector of what a session with the library computes; a context, which holds its sessions.

    Args:
        operators: library of ``plugin build --cpu``.

    Raises:
        IntegrityError: the library cannot be loaded.
        ModelError: ONNX Runtime refuses the artifact with the library.
    """

    def __init__(self, source: ReferenceSource, proto: onnx.ModelProto, operators: Path, limits: Table) -> None:
        self._source, self._proto = source, proto
        self._options = RuntimeOptions(CPU, operators=operators)
        self._data = data_type(precision_of(proto)).name
        self._nodes = instrument.sites(proto)
        self._shared = Shared(limits)
        self._alone = Readings(self._data, "alone", self._shared)
        self._inside = Readings(self._data, "inside the session", self._shared)
        self._outputs = EndToEnd(self._data, self._shared, "session")
        self._segments = Segments(self._data, source, self._shared, shown=True)
        self._unread: dict[str, str] = {}
        self._noise: Mapping[str, float] = {}
        self._sessions: tuple[_Runner, _Runner] | None = None
        self._refusal = "" if runs_here(proto, self._options) else "ONNX Runtime's CPU has no bfloat16"
        if not self._nodes:
            self._refusal = "the artifact has no SRU node, so nothing is fused"

    def __enter__(self) -> FusedSRUs:
        if not self._refusal:
            self._sessions = self._open(self._proto), self._open(_with_ends(self._proto))
        return self

    def __exit__(self, *exc: object) -> None:
        self._sessions = None

    def _open(self, model: onnx.ModelProto) -> _Runner:
        """A session in the file's own types, with the library."""
        if self._data != "float32":
            return HalfRunner(model, self._options, native=True)
        return OnnxRuntimeRunner(model, self._options)

    def add(self, run: ReferenceRun) -> None:
        """Measure one sample."""
        if self._sessions is None:
            return
        whole, shown = self._sessions
        first = not self._shared.samples.names
        self._shared.samples.add(run)
        if run.deep or not self._noise:
            self._noise = dict(self._source.free_noise(run, self._data))
        if not quantization_of(self._proto):
            self._outputs.add(run, whole.run(run.inputs), self._noise)
        if run.deep:
            self._shared.sites.add(run)
            self._look_inside(run, shown.run(run.inputs))
        if first:
            for site in run.sites.values():
                self._alone_on(site)

    def _look_inside(self, run: ReferenceRun, found: Arrays) -> None:
        """Gates of the session's SRUs, each on its own input, and the segments between them."""
        ends = {}
        for name, site in run.sites.items():
            x, y = (found.get(f"{name}::{side}") for side in ("x", "y"))
            if x is None or y is None:
                self._unread[name] = "the artifact has no node for it"
            elif x.shape != site.mask.shape or y.shape != site.mask.shape:
                self._unread[name] = f"its ends are {x.shape} and {y.shape}, in PyTorch they are {site.mask.shape}"
            elif not np.isfinite(x).all():
                self._shared.finite.note(f"the session's input of {name}", run)
            else:
                ends[name] = Ends(x.astype(np.float32), y.astype(np.float32))
                self._inside.add(site.site, ends[name].y, ends[name].x, decide(ends[name].x, site.site.form))
        if not quantization_of(self._proto):
            self._segments.add(run, ends, found)

    def _alone_on(self, run: SiteRun) -> None:
        """Gates of one SRU alone on the reference's input."""
        site = run.site
        if run.x is None or not np.isfinite(run.x).all():
            self._unread[site.name] = "its input was not recorded, or is not finite"
            return
        models = sru_models.of_artifact(self._proto, site, run.x.shape)
        if not models:
            self._unread[site.name] = "there is no ONNX model of it alone"
            return
        x = rounded(run.x, self._data)
        expected = run.mask if self._data == "float32" else decide(x, site.form)
        runner = self._open(onnx.load_model_from_string(models["plugin"]))
        y = runner.run({sru_models.SRU_X: x})[sru_models.SRU_Y]
        self._alone.add(site, y, x, expected)

    def checks(self) -> list[Check]:
        """Checks of the link; a single one that was not run where the artifact cannot run so."""
        if self._refusal:
            return [Check(_GATES, "not run", self._refusal)]
        checks = []
        if self._alone.apart:
            checks.append(readings_gates(_GATES, self._alone, f"{len(self._alone.apart)} SRUs alone"))
            checks.append(readings_values("values of SRUs", self._alone))
        if self._inside.apart:
            checks.append(readings_gates("gates inside", self._inside, f"{len(self._inside.apart)} SRUs inside"))
            checks.append(readings_values("values inside", self._inside))
        checks += not_run("SRUs inside", self._unread)
        if quantization_of(self._proto):
            why = "the artifact is quantised, which moves its outputs more than gates do; see the other links"
            return [*checks, Check("end to end", "not run", why), *self._shared.checks()]
        return [*checks, *self._segments.checks(), *self._outputs.checks()]


def _with_ends(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose SRUs show their input and output, and without functions: it runs with the library or not at all."""
    copy = without_functions(proto)
    for site, node in instrument.sites(copy).items():
        for side, value in (("x", node.input[0]), ("y", node.output[0])):
            name = f"{site}::{side}"  # a value of its own: the end may be an input or output of the graph
            copy.graph.node.append(helper.make_node("Identity", [value], [name]))
            copy.graph.output.append(onnx.ValueInfoProto(name=name))
    return copy
