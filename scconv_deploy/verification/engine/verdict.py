"""Verdict on an engine. Standard library, NumPy and the engine's library only: it also runs on the device.

An engine is judged end to end (:mod:`.outputs`), and by each SRU built alone at the engine's precision and fed the
recorded input (:mod:`.srus`). One that was built with ``--debug-tensors srus`` is also judged inside: each SRU on the
engine's own input (:mod:`.inside`), and each segment between SRUs (:mod:`.segments`). An engine that cannot be opened
or crashes has no verdict: that is an error, or a link that was not run, never a parity failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from scconv_deploy.errors import MissingRuntimeError, ModelError, UsageError
from scconv_deploy.records import tolerances
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, EngineParity, Link, ParityReport, SRUParity
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact, choose_profile
from scconv_deploy.runtimes.tensorrt.runner import TensorRTRunner
from scconv_deploy.system.environment import environment_facts
from scconv_deploy.system.gpu import gpus
from scconv_deploy.verification.checks.gates import SiteGates
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.engine.inside import InsideSRUs
from scconv_deploy.verification.engine.outputs import EndToEnd, noise_kind
from scconv_deploy.verification.engine.segments import Segments
from scconv_deploy.verification.engine.sru_alone import lone_sru
from scconv_deploy.verification.engine.srus import LoneSRUs, Models, SRUBuilder, SRUModels
from scconv_deploy.verification.reference.run import ReferenceRun, ReferenceSource, Site

Opener = Callable[[EngineArtifact, Path | None], AbstractContextManager[Any]]
"""Opens an engine with its plugin; yields a runner with ``inputs``, ``outputs``, ``run`` and, for an engine with debug
tensors, ``run_watched``."""
ENGINE_LINK = "engine"
"""Link of a chain without an engine, or whose engine a device builds; other engine links are named by backend."""
HIDDEN = "an engine hides its parameters"


def open_engine(engine: EngineArtifact, plugin: Path | None) -> TensorRTRunner:
    """Open an engine in TensorRT; the default :data:`Opener`."""
    return TensorRTRunner(engine, plugin=plugin)


def no_models(site: Site, shape: tuple[int, ...]) -> Models:
    """No models, so that no SRU is judged alone; the default :data:`.srus.SRUModels`."""
    return {}


def judge_engine(
    source: ReferenceSource,
    engine: EngineArtifact,
    samples: Iterable[object],
    log: StageLog,
    *,
    overrides: Mapping[str, float] | None = None,
    plugin: Path | None = None,
    provenance: Mapping[str, str] | None = None,
    sru_models: SRUModels = no_models,
    opener: Opener = open_engine,
    build_sru: SRUBuilder = lone_sru,
) -> ParityReport:
    """Judge an engine against a reference.

    Args:
        samples: samples of the source; those outside the engine's profile are skipped, and the report says so.
        overrides: tolerances by name that replace the table's.
        plugin: plugin library that the engine was built with.
        sru_models: ONNX models of single SRUs (:mod:`.sru_models`, or a bundle's).
        opener, build_sru: open the engine, and build single SRUs.

    Returns:
        The report, with one link named after the backend; falsy if a check failed.

    Raises:
        UsageError: the engine's inputs or outputs are not the reference's, one of the two is quantised and the other
            is not, no sample fits the profile, or an override names no tolerance.
        IntegrityError: the engine or the plugin is not what the manifest says.
        MissingRuntimeError, ModelError: the engine cannot be opened or run here.
    """
    shared = Shared(tolerances.table(overrides))
    _require_the_same_arithmetic(source, engine)
    kind, shown = noise_kind(engine.manifest), bool(engine.manifest.debug_tensors)
    quantized = engine.manifest.is_quantized
    outputs = EndToEnd(kind, shared, quantized=quantized)
    srus = LoneSRUs(engine, sru_models, build_sru, shared)
    inside, segments = InsideSRUs(engine.manifest, shared), Segments(kind, source, shared, shown, quantized)
    unfit: list[str] = []
    recorded: ReferenceRun | None = None
    first: ReferenceRun | None = None
    with log.stage(f"verify {engine.manifest.backend}") as stage:
        with opener(engine, plugin) as runner:
            noise: dict[str, float] = {}
            for sample in samples:
                run = source.run(sample)
                if reason := _check_run(engine, runner, run):
                    unfit.append(reason)
                    stage.skipped.append((run.description, reason))
                    continue
                shared.samples.add(run)
                if run.deep or not noise:
                    noise = dict(source.free_noise(run, outputs.rounding))
                if engine.manifest.debug_tensors and run.deep:
                    found, shown = runner.run_watched(run.inputs, inside.watched)
                    ends = inside.ends(run, found, shown)
                    inside.add(run, ends)
                    segments.add(run, ends, found)
                else:
                    found = runner.run(run.inputs)
                outputs.add(run, found, noise)
                recorded = recorded or _add_sites(shared, run)
                first = first or run
        if not shared.samples.names:
            raise UsageError(
                f"No sample fits the engine: {unfit[0] if unfit else 'there is none.'}",
                "Give inputs within its profile, or build it for these sizes.",
            )
        judged = recorded or first  # a run without recorded inputs reports each SRU as not judged
        for site in judged.sites.values() if judged is not None else ():
            srus.judge(site)
        stage.applied += shared.samples.names
    checks = [*srus.checks(), *inside.checks(), *segments.checks(), *outputs.checks()]
    if unfit:
        checks.append(Check("samples", "not run", f"{len(unfit)} outside the engine's profile: {unfit[0]}"))
    link = Link.of(engine.manifest.backend, checks)
    return _report(source, engine, link, shared, srus, outputs, log, overrides or {}, provenance or {})


def try_to_judge(engine: EngineArtifact, judge: Callable[[], ParityReport]) -> tuple[Link, ParityReport | None]:
    """Judge an engine; return its link and report, or a link "not run" with the reason if it cannot run.

    Args:
        judge: calls :func:`judge_engine` or :func:`judge_with_bundle`.
    """
    try:
        report = judge()
    except (MissingRuntimeError, ModelError, UsageError) as error:
        built = f"{engine.manifest.summary}, sha256 {engine.manifest.sha256[:12]}"
        return Link(engine.manifest.backend, "not run", f"built, but it was not run: {error.message} ({built})"), None
    return report.links[0], report


def with_engine(report: ParityReport, link: Link, engine: ParityReport | None) -> ParityReport:
    """Add the link and measurements of an engine to a report; an older link of that name is replaced."""
    kept = [old for old in report.links if old.name != link.name]
    stages, measured = (engine.stages, engine.engines) if engine is not None else ((), ())
    return replace(report, links=(*kept, link), stages=(*report.stages, *stages), engines=(*report.engines, *measured))


def _require_the_same_arithmetic(source: ReferenceSource, engine: EngineArtifact) -> None:
    """Refuse to hold codes against floats (UsageError): rounding to int8 would count as a fault, or hide one."""
    if engine.manifest.is_quantized == source.rounds_to_codes:
        return
    if source.rounds_to_codes:
        raise UsageError(
            f"The engine is {engine.manifest.precision_name}, and the reference {source.name} is fake-quantised.",
            "Give the float model that the engine was made from.",
        )
    raise UsageError(
        f"The engine is {engine.manifest.precision_name}, and the reference {source.name} does not round to its codes, "
        "so that the rounding would count as a fault.",
        "Give its bundle, or the model with the ONNX file that it was built from beside the engine.",
    )


def _check_run(engine: EngineArtifact, runner: Any, run: ReferenceRun) -> str:
    """Reason why a sample does not fit the engine's profile, "" if it does (UsageError for other names)."""
    for what, found, wanted in (("inputs", runner.inputs, run.inputs), ("outputs", runner.outputs, run.given)):
        if list(found) != list(wanted):  # the order counts too: programs that feed by position would mix them up
            raise UsageError(
                f"The engine's {what} are {', '.join(found)}; the reference's {', '.join(wanted)}.",
                "Give the model that this engine was built from.",
            )
    try:
        choose_profile(engine.manifest.profiles, {name: value.shape for name, value in run.inputs.items()})
    except UsageError as error:
        return error.message
    return ""


def _add_sites(shared: Shared, run: ReferenceRun) -> ReferenceRun | None:
    """Add the reference's gates on one sample; return the run if the inputs of its SRUs were kept."""
    if not any(site.x is not None for site in run.sites.values()):
        return None
    shared.sites.add(run)
    return run


def _report(
    source: ReferenceSource,
    engine: EngineArtifact,
    link: Link,
    shared: Shared,
    srus: LoneSRUs,
    outputs: EndToEnd,
    log: StageLog,
    overrides: Mapping[str, float],
    provenance: Mapping[str, str],
) -> ParityReport:
    manifest = engine.manifest
    records = tuple(_sru(found, srus.counts.get(name)) for name, found in shared.sites.gates.items())
    gpu = ", ".join(map(str, gpus()))
    parity = EngineParity(
        manifest.backend, manifest.library_version, engine.path.name, manifest.sha256, gpu, records, outputs.outputs(),
        precision=manifest.precision_name,
    )  # fmt: skip
    facts = {
        **environment_facts(),
        manifest.backend: manifest.library_version,
        "gpu": gpu or "none",
        "numpy": np.__version__,
    }
    return ParityReport(
        model=source.name,
        artifact=str(engine.path),
        artifact_sha256=manifest.sha256,
        links=(link,),
        srus=records,
        outputs=(),
        samples=shared.samples.names,
        left_alone=source.left_alone,
        provenance=facts | dict(provenance),
        stages=tuple(log.records),
        worst_inputs=shared.answers.worst_inputs,
        accuracy=shared.answers.accuracy,
        overrides=dict(overrides),
        engines=(parity,),
    )


def _sru(found: SiteGates, flips: FlipCount | None) -> SRUParity:
    return SRUParity(
        site=found.site.name,
        variant=found.site.variant,
        static=Check("static", "not run", HIDDEN),
        swapped=FlipCount(0),
        teacher_forced=flips,
        open_share=found.open_share,
        margins=found.margins,
    )
