"""The chain from the reference to the artifact, link by link, and the verdict; no torch in it.

``PyTorch as given -> with SRUs swapped -> ONNX Runtime -> precision``: each SRU is fed the reference's own input and
its gates are compared one by one; running free, every changed gate must be explained by the error of its input; with
the gates fixed the rest is continuous and is judged by its error against PyTorch's own rounding noise, or against the
rounding of half data. See DESIGN section 6.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import onnx

from scconv_deploy.errors import UsageError
from scconv_deploy.gate.margins import MARGIN_EDGES
from scconv_deploy.graph import instrument
from scconv_deploy.graph.types import Precision, data_type, precision_of, quantization_of
from scconv_deploy.records import tolerances
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, FreeRunning, Histogram, Link, OutputParity, ParityReport, SRUParity
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.half import needs_stand_in, runs_here
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.checks import parity, weights
from scconv_deploy.verification.checks.gates import accuracy_checks
from scconv_deploy.verification.checks.half_range import RangeWatch
from scconv_deploy.verification.checks.other_gates import other_gate_records, other_gates_checks
from scconv_deploy.verification.measure import Measured, SiteMeasured
from scconv_deploy.verification.onnx.departure import first_departure
from scconv_deploy.verification.onnx.measurement import ArtifactMeasurement
from scconv_deploy.verification.reference.run import ReferenceSource
from scconv_deploy.version import __version__

SWAPPED_LINK = "PyTorch with SRUs swapped"
ONNX_LINK = "onnxruntime"
PRECISION_LINK = "precision"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Artifact:
    """What is judged.

    Attributes:
        proto: the model with its external data loaded.
        name: of the file; ``content`` is what is hashed.
        single: the float32 model that a half one was converted from, a link of its own; None if it is not at hand.
    """

    proto: onnx.ModelProto
    name: str
    content: bytes
    single: onnx.ModelProto | None = None

    @property
    def precision(self) -> Precision:
        """The type of its data."""
        return precision_of(self.proto)

    @property
    def quantization(self) -> str:
        """How it is quantised; "" if it is not."""
        return quantization_of(self.proto)


@dataclass(frozen=True)
class Judging:
    """How it is judged.

    Attributes:
        overrides: tolerances by name, instead of the table's.
        runtime: of ONNX Runtime.
    """

    overrides: Mapping[str, float] = field(default_factory=dict)
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)


def verify_artifact(
    source: ReferenceSource,
    artifact: Artifact,
    samples: Iterable[object],
    log: StageLog,
    *,
    judging: Judging = Judging(),
    provenance: Mapping[str, str] | None = None,
) -> ParityReport:
    """Judge an ONNX model against a reference.

    Args:
        samples: what the source runs; read once, one at a time.

    Returns:
        The report; falsy when a check failed.

    Raises:
        UsageError: there is no sample, or a label outside the model's classes; the artifact's inputs or outputs are not
            the reference's, or an override names no tolerance.
        MissingRuntimeError: the provider cannot run here.
        ModelError: ONNX Runtime or the reference cannot run the inputs at all.
    """
    proto, runtime = artifact.proto, judging.runtime
    table = tolerances.table(judging.overrides)
    measured, single = Measured(table, data_type(artifact.precision)), None
    with log.stage("verify") as stage, ExitStack() as stack:
        measurements = [stack.enter_context(ArtifactMeasurement(source, proto, measured, runtime))]
        ranges = None
        if artifact.single is not None and artifact.precision != "fp32":
            ranges = RangeWatch(artifact.single, proto, artifact.precision, runtime)
        if artifact.single is not None and not source.swapped_link:
            single = Measured(table)
            measurements.append(stack.enter_context(ArtifactMeasurement(source, artifact.single, single, runtime)))
        for sample in samples:
            run = source.run(sample)
            measured.describe(run)
            for measurement in measurements:
                measurement.run(run)
            if ranges is not None and run.deep:
                ranges.add(run.inputs)
        if not measured.described:
            raise UsageError("There is no sample, so nothing can be judged.", "Give at least one.")
        stage.applied += measured.sample_names
        stage.skipped += measured.redundant.items()
        if measured.float64_refusal:
            stage.skipped.append(("float64 among the runs whose distance is the noise", measured.float64_refusal))
    nodes = instrument.sites(proto)
    statics = parity.static_checks(proto, nodes, measured)
    links = _links(source, artifact, statics, measured, single, ranges, runtime)
    failed = any(link.status == "failed" for link in links)
    return ParityReport(
        model=source.name,
        artifact=artifact.name,
        artifact_sha256=hashlib.sha256(artifact.content).hexdigest(),
        links=links,
        srus=tuple(_sru(found, measured, statics[name]) for name, found in measured.sites.items()),
        outputs=tuple(_output(name, measured) for name in measured.unruled | measured.replay),
        samples=measured.sample_names,
        left_alone=source.left_alone,
        provenance=_provenance(runtime) | dict(provenance or {}),
        stages=tuple(log.records),
        layers=tuple(measured.layers.values()),
        first_departure=_departure(source, proto, measured, runtime, statics) if failed else "",
        worst_inputs=measured.worst_inputs,
        accuracy=measured.paired.accuracy(),
        overrides=dict(judging.overrides),
        other_gates=other_gate_records(measured),
    )


def _links(
    source: ReferenceSource,
    artifact: Artifact,
    statics: Mapping[str, Check],
    measured: Measured,
    single: Measured | None,
    ranges: RangeWatch | None,
    runtime: RuntimeOptions,
) -> tuple[Link, ...]:
    swapped = Link(SWAPPED_LINK, "not run", source.swapped_link)
    if not source.swapped_link:
        swapped = Link.of(SWAPPED_LINK, parity.swapped_checks(source.recognised, measured))
    if artifact.quantization:
        away = f"the artifact is {artifact.quantization}; its float form is not at hand"
        judged = parity.quantized_checks(artifact.proto, artifact.quantization, statics, measured)
        precision = Link.of(PRECISION_LINK, judged)
        return (swapped, Link(ONNX_LINK, "not run", away), precision, Link("engine", "not run", "no engine was built"))
    found = _artifact_checks(source, artifact.proto, statics, measured)
    if artifact.precision == "fp32":
        onnx_link = Link.of(ONNX_LINK, found)
        precision = Link(PRECISION_LINK, "not run", "the artifact computes in fp32; nothing was converted")
    else:
        away = f"the artifact computes in {artifact.precision}; its float32 form is not at hand"
        onnx_link = Link(ONNX_LINK, "not run", source.swapped_link or away)
        if artifact.single is not None and single is not None:
            checks = parity.static_checks(artifact.single, instrument.sites(artifact.single), single)
            onnx_link = Link.of(ONNX_LINK, _artifact_checks(source, artifact.single, checks, single))
        before = [*_stand_in(artifact, runtime), *_in_range(artifact, ranges, measured.coverage)]
        precision = Link.of(PRECISION_LINK, [*before, *found])
    return (swapped, onnx_link, precision, Link("engine", "not run", "no engine was built"))


def _artifact_checks(
    source: ReferenceSource, proto: onnx.ModelProto, statics: Mapping[str, Check], measured: Measured
) -> list[Check]:
    nodes = instrument.sites(proto)
    stored = _weights(source, proto, measured)
    return [
        parity.static_summary(proto, nodes, statics, measured),
        *parity.unread_checks(nodes, statics, measured),
        *parity.rewritten_checks(nodes, measured),
        stored,
        parity.teacher_forced_check(measured),
        *parity.second_opinion_checks(measured),
        parity.free_running_check(measured),
        *other_gates_checks(measured),
        *parity.rounding_checks(measured),
        *parity.replay_checks(measured),
        *parity.layers_check(measured),
        *parity.native_checks(measured),
        *parity.contract_checks(measured),
        *parity.finite_checks(measured),
        *accuracy_checks(measured),
    ]


def _in_range(artifact: Artifact, ranges: RangeWatch | None, coverage: str) -> list[Check]:
    """Whether half holds all values, by the layers that give them."""
    if ranges is None or not ranges.largest:
        return []
    producers = {name: node for node in artifact.proto.graph.node for name in node.output}

    def module_of(name: str) -> str:
        return instrument.module_of(producers[name]) if name in producers else ""

    return [ranges.check(module_of, coverage)]


def _stand_in(artifact: Artifact, runtime: RuntimeOptions) -> list[Check]:
    """Said where the artifact itself cannot run."""
    if not needs_stand_in(artifact.proto, runtime) or runs_here(artifact.proto, runtime):
        return []
    text = f"ONNX Runtime cannot run {artifact.precision} here: a stand-in that computes each operator in float32 and "
    return [Check("stand-in", "not run", f"{text}rounds what it gives was judged")]


def _departure(
    source: ReferenceSource,
    proto: onnx.ModelProto,
    measured: Measured,
    runtime: RuntimeOptions,
    statics: Mapping[str, Check],
) -> str:
    """The first value that leaves its tolerance; where all values keep it, the first SRU whose gates do not."""
    found = first_departure(source, proto, measured, runtime)
    if found:
        return found
    for name, site in measured.sites.items():
        where = name if name == site.site.path else f"{name} ({site.site.path})"
        for count in (site.teacher_forced, site.free_running):
            if count is not None and count.unexplained:
                return f"gates of {where}: {count.unexplained:,} of {count.gates:,} unexplained"
        if statics[name].status == "failed":
            return f"node {where}: {statics[name].reason.removeprefix(f'{name}: ')}"
    for name, gate in measured.others.sites.items():
        if gate.flips.unexplained:
            return f"gates of {name}: {gate.flips.unexplained:,} of {gate.flips.gates:,} unexplained"
    stored = _weights(source, proto, measured)
    return stored.reason if stored.status == "failed" else ""


def _weights(source: ReferenceSource, proto: onnx.ModelProto, measured: Measured) -> Check:
    if not len(source.weights):
        return Check(weights.NAME, "not run", "the reference holds no weights to compare with")
    return weights.check(proto, source.weights, measured.limits["weight_ulps"].value)


def _sru(found: SiteMeasured, measured: Measured, static: Check) -> SRUParity:
    free, bins = found.free_running, found.histogram
    return SRUParity(
        site=found.site.name,
        variant=found.site.variant,
        static=static,
        swapped=measured.swapped_flips.get(found.site.path, FlipCount(0)),
        teacher_forced=found.teacher_forced,
        open_share=found.opened / found.gates,
        free_running=None if free is None else _free_running(free),
        margins=Histogram(MARGIN_EDGES, tuple(map(int, bins))) if bins.any() else None,
        jump=found.jump,
    )


def _free_running(count: FlipCount) -> FreeRunning:
    return FreeRunning(count.gates, count.flips, count.unexplained, count.channels, count.ill_conditioned)


def _output(name: str, measured: Measured) -> OutputParity:
    found = (measured.unruled | measured.replay)[name]
    return OutputParity(name, measured.end_to_end[name], found.error, found.floor, found.measured)


def _provenance(runtime: RuntimeOptions) -> dict[str, str]:
    facts = {
        "scconv_deploy": __version__,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "provider": runtime.resolved_provider(),
    }
    for name in ("torch", "onnx", "onnxruntime", "onnxsim", "onnxscript", "numpy"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:  # a bundle is verified without most of them
            continue
    return facts
