"""The chain from the reference to the artifact, link by link, and the verdict; no torch in it.

``PyTorch as given -> with SRUs swapped -> ONNX Runtime``: each SRU is fed the reference's own input and its gates are
compared one by one; running free, every changed gate must be explained by the error of its input; with the gates
fixed the rest is continuous and is judged by its error against PyTorch's own rounding noise. See DESIGN section 6.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version

import onnx

from scconv_deploy import __version__
from scconv_deploy.margins import MARGIN_EDGES
from scconv_deploy.outcomes import FlipCount
from scconv_deploy.report.records import (
    Check,
    FreeRunning,
    Histogram,
    Link,
    OutputParity,
    ParityReport,
    SRUParity,
    StageLog,
)
from scconv_deploy.verification import instrument, judge, tolerances, weights
from scconv_deploy.verification.artifact import ArtifactMeasurement
from scconv_deploy.verification.departure import first_departure
from scconv_deploy.verification.measure import Measured, SiteMeasured
from scconv_deploy.verification.reference_run import ReferenceSource
from scconv_deploy.verification.runners.onnxruntime import RuntimeOptions

SWAPPED_LINK = "PyTorch with SRUs swapped"
ONNX_LINK = "onnxruntime"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Artifact:
    """What is judged: the model with its external data loaded, its name, and the bytes that are hashed."""

    proto: onnx.ModelProto
    name: str
    content: bytes


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
        UsageError: the artifact's inputs or outputs are not the reference's, or an override names no tolerance.
        MissingRuntimeError: the provider cannot run here.
        ModelError: ONNX Runtime or the reference cannot run the inputs at all.
    """
    proto, runtime = artifact.proto, judging.runtime
    measured = Measured(tolerances.table(judging.overrides))
    described: dict[str, int] = {}
    with log.stage("verify") as stage, ArtifactMeasurement(source, proto, measured, runtime) as measurement:
        for sample in samples:
            run = source.run(sample)
            kind = run.kind or run.description
            described[kind] = described.get(kind, 0) + 1
            measurement.run(run)
        names = tuple(text if n == 1 else f"{text}, {n} batches" for text, n in described.items())
        stage.applied += names
        stage.skipped += measured.redundant.items()
        if measured.float64_refusal:
            stage.skipped.append(("noise floor in float64", measured.float64_refusal))
    nodes = instrument.sites(proto)
    statics = judge.static_checks(proto, nodes, measured)
    links = _links(source, artifact, nodes, statics, measured)
    failed = any(link.status == "failed" for link in links)
    return ParityReport(
        model=source.name,
        artifact=artifact.name,
        artifact_sha256=hashlib.sha256(artifact.content).hexdigest(),
        links=links,
        srus=tuple(_sru(found, measured, statics[name]) for name, found in measured.sites.items()),
        outputs=tuple(_output(name, measured) for name in measured.replay),
        samples=names,
        left_alone=source.left_alone,
        provenance=_provenance(runtime) | dict(provenance or {}),
        stages=tuple(log.records),
        layers=tuple(measured.layers.values()),
        first_departure=_departure(source, proto, measured, runtime, statics) if failed else "",
        worst_inputs=measured.worst_inputs,
        accuracy=measured.paired.accuracy() if measured.paired else None,
        overrides=dict(judging.overrides),
    )


def _links(
    source: ReferenceSource,
    artifact: Artifact,
    nodes: Mapping[str, onnx.NodeProto],
    statics: Mapping[str, Check],
    measured: Measured,
) -> tuple[Link, ...]:
    swapped = Link(SWAPPED_LINK, "not run", source.swapped_link)
    if not source.swapped_link:
        swapped = Link.of(SWAPPED_LINK, judge.swapped_checks(source.recognised, measured))
    stored = _weights(source, artifact.proto, measured)
    return (
        swapped,
        Link.of(ONNX_LINK, [
            judge.static_summary(artifact.proto, nodes, statics, measured),
            *judge.rewritten_checks(artifact.proto, nodes, measured),
            *([stored] if stored is not None else []),
            judge.teacher_forced_check(measured),
            *judge.second_opinion_checks(measured),
            judge.free_running_check(measured),
            *judge.replay_checks(measured),
            *judge.layers_check(measured),
            *judge.contract_checks(measured),
            *judge.finite_checks(measured),
        ]),
        Link("precision", "not run", "the artifact computes in fp32; nothing was converted"),
        Link("engine", "not run", "no engine was built"),
    )  # fmt: skip


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
        for count in (site.teacher_forced, site.free_running):
            if count is not None and count.unexplained:
                return f"gates of {name} ({site.site.path}): {count.unexplained} of {count.gates:,} unexplained"
        if statics[name].status == "failed":
            return f"node {name} ({site.site.path}): {statics[name].reason.removeprefix(f'{name}: ')}"
    stored = _weights(source, proto, measured)
    return stored.reason if stored is not None and stored.status == "failed" else ""


def _weights(source: ReferenceSource, proto: onnx.ModelProto, measured: Measured) -> Check | None:
    return weights.check(proto, source.weights, measured.limits["weight_ulps"].value) if len(source.weights) else None


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
    found = measured.replay[name]
    return OutputParity(name, measured.end_to_end[name], found.error, found.floor, not measured.float64_refusal)


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
