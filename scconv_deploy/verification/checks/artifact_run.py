"""Runs of an ONNX artifact on one sample (unchanged, gates exposed, gates injected), and the base of its checks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

import numpy as np
import onnx

from scconv_deploy.errors import UsageError
from scconv_deploy.gate.other_gates import Found
from scconv_deploy.graph import gates as onnx_gates
from scconv_deploy.graph import instrument
from scconv_deploy.graph.quantization import Quantizer
from scconv_deploy.records.parity import Check
from scconv_deploy.runtimes.half import HalfRunner, runner_of
from scconv_deploy.runtimes.onnxruntime import OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.detections import align_rows
from scconv_deploy.verification.metrics import Part, comparable, distance
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun, ReferenceSource, RoundedRun
from scconv_deploy.verification.ruler import FLOAT32, AgainstNoise

Runner = OnnxRuntimeRunner | HalfRunner


class ArtifactRuns:
    """Sessions of an artifact, each made on first use.

    Args:
        source: the reference.
        proto: the artifact.
        options: settings of ONNX Runtime.
        quantizers: quantisers of activations by the names of their gates.

    Attributes:
        nodes: SRU nodes of the artifact by site.
        fixed: gates of no known SRU that are exposed and injected as well.
    """

    def __init__(
        self,
        source: ReferenceSource,
        proto: onnx.ModelProto,
        shared: Shared,
        options: RuntimeOptions,
        quantizers: Mapping[str, Quantizer] | None = None,
    ) -> None:
        self.proto, self.options, self.nodes = proto, options, instrument.sites(proto)
        self.quantizers = quantizers or {}
        self.fixed: list[Found] = []
        self._source, self._shared = source, shared
        self._free: Runner | None = None
        self._sessions: dict[str, Runner] = {}
        self._probes: dict[str, Runner | None] = {}

    def close(self) -> None:
        """Close all sessions."""
        self._sessions.clear()
        self._probes.clear()
        self._free = None

    @property
    def as_it_is(self) -> Runner:
        if self._free is None:
            self._free = runner_of(self.proto, self.options)
        return self._free

    def fix(self, gates: list[Found]) -> None:
        """Expose and inject these gates of no known SRU from now on."""
        if gates != self.fixed:
            self._sessions.clear()
        self.fixed = gates

    def session(self, name: str, make: Callable[[], Runner]) -> Runner:
        """Session of this name; made again after other gates were fixed."""
        if name not in self._sessions:
            self._sessions[name] = make()
        return self._sessions[name]

    def exposed(self, run: ReferenceRun) -> onnx.ModelProto:
        """Artifact with its gates and their inputs among its outputs."""
        model = instrument.expose_gates(self.proto, list(run.sites))
        onnx_gates.expose(model, self.fixed)
        return model

    def injected(self, run: ReferenceRun) -> onnx.ModelProto:
        """Artifact with its gates among its inputs."""
        model = instrument.inject_gates(self.proto, list(run.sites))
        onnx_gates.inject(model, self.fixed)
        return model

    def probe_model(self, site: str) -> onnx.ModelProto | None:
        """Model of one SRU alone, see :func:`.instrument.gate_probe`; None if the artifact has no node for it."""
        node = self.nodes.get(site)
        return instrument.gate_probe(self.proto, node) if node is not None else None

    def probe(self, site: str) -> Runner | None:
        """Session of one SRU alone; None if the artifact has no node for it."""
        if site not in self._probes:
            model = self.probe_model(site)
            self._probes[site] = runner_of(model, self.options) if model is not None else None
        return self._probes[site]

    def of(self, run: ReferenceRun) -> ArtifactRun:
        """Prepare the runs of one sample.

        Raises:
            UsageError: the artifact's inputs or outputs are not the reference's.
        """
        _same_names("inputs", self.as_it_is.inputs, run.inputs)
        _same_names("outputs", self.as_it_is.outputs, run.given)
        ruler, rounded = self._shared.ruler, None
        if run.deep and ruler.data != FLOAT32:
            rounded = self._source.rounded(run, self.proto, ruler.data.name)
        if rounded is not None:
            ruler.add_rounded(rounded)
        return ArtifactRun(self, self._shared, run, rounded)


class ArtifactRun:
    """Runs of an artifact on one sample; each run is made once, when a check first needs it.

    Attributes:
        rounded: reference rounded to the artifact's half type; None for a float32 artifact, or if not available.
    """

    def __init__(self, runs: ArtifactRuns, shared: Shared, run: ReferenceRun, rounded: RoundedRun | None) -> None:
        self.rounded = rounded
        self._runs, self._shared, self._run = runs, shared, run

    @cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        """Outputs of the unchanged artifact."""
        return self.aligned(self._runs.as_it_is.run(self._run.inputs), self._run.given)

    @cached_property
    def comparable(self) -> list[str]:
        """Names of the outputs with the reference's shape and type and without NaN or Inf on either side."""
        return [
            name
            for name in self._run.outputs
            if same_kind(self.outputs[name], self._run.given[name])
            and comparable(self.outputs[name], self._run.given[name])
        ]

    @cached_property
    def exposed(self) -> Arrays:
        """Gates and gate inputs of the free-running artifact; empty if no gate can be read."""
        session = self._runs.session("exposed", lambda: runner_of(self._runs.exposed(self._run), self._runs.options))
        return {} if set(session.outputs) == set(self._run.given) else session.run(self._run.inputs)

    @cached_property
    def forced(self) -> Arrays:
        """Replay of a deep run: outputs and gate inputs with the reference's gates injected."""
        self.__dict__.pop("exposed", None)  # both hold the input of every gate: keep one at a time
        session = self._runs.session("forced", lambda: runner_of(self._runs.injected(self._run), self._runs.options))
        return session.run(self._run.feeds(session.inputs))

    @cached_property
    def replayed(self) -> dict[str, np.ndarray]:
        """Outputs of the replay."""
        return self.aligned(self.forced, self._run.outputs)

    @property
    def unruled(self) -> bool:
        """Whether a half artifact has no rounded reference, so that its replay error has no limit."""
        return self._shared.ruler.data != FLOAT32 and self.rounded is None

    def aligned(self, outputs: Arrays, reference: Arrays) -> dict[str, np.ndarray]:
        """Outputs with their detections in the reference's order."""
        return align_rows(outputs, reference, self._shared.limits["equal_scores"].value)

    def against(self, name: str, y: np.ndarray, floor: float | None) -> AgainstNoise:
        """Measure a replayed output against the reference; for a half artifact, against the rounded reference.

        A half file that keeps layers in float32 may be nearer to float32; then it is measured against that.

        Args:
            floor: noise floor of the output in float32; None assumes one.
        """
        value, ruler = self._run.outputs[name], self._shared.ruler
        rounded = None if self.rounded is None else self.rounded.outputs.get(name)
        if self.rounded is None or rounded is None or rounded.shape != y.shape:
            return ruler.measure(y, value, floor)
        noise = self.rounded.floors.get(name)
        noise = floor if noise is None else noise
        if value.dtype.kind != "f" and noise is not None:  # one of few entries can change by luck in few runs
            noise = max(noise, distance(rounded, value))
        return ruler.measure_nearest(y, (rounded, value), noise)

    def against_part(self, part: Part) -> AgainstNoise | None:
        """Measure a part of a replayed output as :meth:`against` does; None if its noise was not measured."""
        right, floors = [self._run.outputs[part.output]], self._run.part_floors
        if self.rounded is not None:
            right, floors = [self.rounded.outputs[part.output], *right], self.rounded.part_floors
        if part.name not in floors:
            return None
        y, floor = part.of(self.replayed[part.output]), floors[part.name]
        return self._shared.ruler.measure_nearest(y, map(part.of, right), floor)


class ArtifactCheck:
    """Base of the checks of an ONNX artifact: ``add`` measures one sample, ``checks`` judges all of them."""

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        """Measure one sample from the runs of the reference and the artifact."""

    def checks(self) -> list[Check]:
        """Judge all samples."""
        return []


def same_kind(y: np.ndarray, expected: np.ndarray) -> bool:
    """Whether two outputs have the same shape and dtype."""
    return y.shape == expected.shape and y.dtype == expected.dtype


def other_shape(site: str, found: np.ndarray, expected: np.ndarray) -> str:
    """Message for an SRU's input of another shape than the reference's."""
    return f"the input of {site} is {list(found.shape)}, PyTorch's {list(expected.shape)}"


def _same_names(what: str, artifact: Iterable[str], reference: Iterable[str]) -> None:
    """Refuse other names or another order: programs that feed by position would mix them up (UsageError)."""
    if list(artifact) != list(reference):
        raise UsageError(
            f"The artifact's {what} are {', '.join(artifact)}; the reference's {', '.join(reference)}.",
            "Give the model that this artifact was exported from.",
        )
