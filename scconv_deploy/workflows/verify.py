"""``scconv-deploy verify``: judge an ONNX file, a bundle or an engine against a reference.

The reference is a model, an ONNX file, or the runs recorded in a bundle. PyTorch is imported only where it is used: a
bundle is judged without torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scconv_deploy.bundle.contents import REFERENCE
from scconv_deploy.bundle.engine_verdict import judge_with_bundle
from scconv_deploy.bundle.reference import read_sealed_reference
from scconv_deploy.errors import UsageError
from scconv_deploy.graph.file import read_onnx
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records import tolerances
from scconv_deploy.records.parity import Check, Link, ParityReport
from scconv_deploy.records.stage import Progress, StageLog, silent
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact, load_engine
from scconv_deploy.runtimes.tensorrt.runner import check_plugin_of, require_runtime
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.verification import sru_models
from scconv_deploy.verification.engine.srus import Models, SRUModels
from scconv_deploy.verification.engine.verdict import judge_engine
from scconv_deploy.verification.onnx.chain import Artifact, recorded_quantization, verify_artifact
from scconv_deploy.verification.options import Checks
from scconv_deploy.verification.reference.run import ReferenceSource, Site
from scconv_deploy.workflows.fused_cpu import FUSED, is_fused, with_operators
from scconv_deploy.workflows.provenance import provenance_of
from scconv_deploy.workflows.subject import Bundle, Engine, OnnxFile, artifact_of

if TYPE_CHECKING:
    from torch import nn

    from scconv_deploy.model.prepare import Reference
    from scconv_deploy.verification.onnx.shards import DataShards
    from scconv_deploy.verification.samples import Sample
    from scconv_deploy.zoo.embed import EmbedResult


@dataclass(frozen=True)
class _Against:
    """Reference that an artifact is judged against.

    Attributes:
        source: source of the reference runs.
        samples: samples of the source.
        log: stage log of loading the reference.
        facts: provenance for the report.
        reference: prepared PyTorch model, if the source is a model.
        recorded: whether the source is a bundle's ``reference/``.
        shards: further samples, for other processes.
    """

    source: ReferenceSource
    samples: Iterable[Any]
    log: StageLog
    facts: Mapping[str, str]
    reference: Reference | None = None
    recorded: bool = False
    shards: DataShards | None = None


def verify(
    artifact: str | Path,
    model: nn.Module | EmbedResult,
    example_inputs: Any,
    *,
    dynamic: Sequence[DynamicAxis] = (),
    checks: Checks = Checks(),
) -> ParityReport:
    """Judge an ONNX file, or the one in a bundle, against a module.

    Args:
        artifact: path of an ONNX file or a bundle.
        model, example_inputs, dynamic, checks: as for :func:`deploy`.

    Returns:
        The report, falsy if parity failed.

    Raises:
        ScconvDeployError: with the reason and the remedy.
    """
    from scconv_deploy.model.prepare import reference_from_module

    subject = artifact_of(Path(artifact))
    if isinstance(subject, Engine):
        raise UsageError(
            f"{artifact} is an engine, expected an ONNX file or a bundle.",
            f"Use scconv-deploy verify {artifact} --reference MODEL.",
        )
    opened, notes = _read(subject)
    checks = with_operators(checks, subject.path if isinstance(subject, Bundle) else None)
    reference, log = reference_from_module(model, example_inputs, dynamic)
    against = _against_model(reference, checks, checks.samples(reference, 0), log, {}, silent)
    return _judge_onnx(opened, against, checks, notes)


def verify_subject(
    artifact: OnnxFile | Engine | Bundle,
    reference: ModelSpec | OnnxFile | Bundle,
    checks: Checks = Checks(),
    *,
    plugin: Path | None = None,
    command: str = "",
    progress: Progress = silent,
) -> ParityReport:
    """Judge an artifact against a reference; ``scconv-deploy verify``.

    Args:
        reference: a model, another ONNX file, or a bundle, whose ``reference/`` is used. For an ONNX artifact, a bundle
            as the reference must be the artifact itself.
        plugin: plugin library that an engine was built with.

    Returns:
        The report; falsy if a check failed.

    Raises:
        UsageError: a file is missing, a bundle has no ``reference/``, a tolerance is unknown, the engine was built
            without a plugin, or it is int8 and the reference an ONNX file.
        IntegrityError: a file is damaged, an engine is not what its manifest says, or a file of ``reference/`` differs
            from the manifest.
        ModelError: ONNX Runtime refuses a file, or the model cannot be loaded.
        MissingRuntimeError: the library of an engine is missing or of another version, or there is no GPU.
    """
    tolerances.table(checks.tolerances)  # refuse a wrong name before any work is done
    if isinstance(artifact, Engine) and is_fused(checks.provider):
        raise UsageError(f"--provider {FUSED} belongs to ONNX files.", "Leave it out.")
    checks = with_operators(checks, artifact.path if isinstance(artifact, Bundle) else None)
    if isinstance(artifact, Engine):
        engine = _open(artifact, plugin, reference)
        if isinstance(reference, Bundle):
            progress(f"verifying {artifact.path.name} against {reference.path}")
            return judge_with_bundle(
                reference.path, engine, StageLog(),
                overrides=checks.tolerances, plugin=plugin, provenance={"command": command},
            )  # fmt: skip
        against = _against(reference, checks, command, progress)
        models, facts = models_of(engine, *([reference.path] if isinstance(reference, OnnxFile) else []))
        return judge_engine(
            _with_codes_of(engine, against), engine, against.samples, against.log,
            overrides=checks.tolerances, plugin=plugin, provenance={**against.facts, **facts}, sru_models=models,
        )  # fmt: skip
    opened, notes = _read(artifact)
    if isinstance(reference, Bundle):
        progress(f"verifying {Path(opened.name).name} against {REFERENCE}/")
    report = _judge_onnx(opened, _against(reference, checks, command, progress), checks, notes)
    if artifact != reference or not notes:
        return report
    return replace(report, links=tuple(_with_notes(link, notes) for link in report.links))


def _read(artifact: OnnxFile | Bundle) -> tuple[Artifact, dict[str, str]]:
    """Read the ONNX file of an artifact; return it and notes for the report."""
    path, notes = artifact.model_file()
    return Artifact(read_onnx(path), str(path), path.read_bytes()), notes


def _open(artifact: Engine, plugin: Path | None, reference: ModelSpec | OnnxFile | Bundle) -> EngineArtifact:
    """Read an engine; refuse one that cannot run here, or be judged by this reference, before that is loaded."""
    engine = load_engine(artifact.path)
    if isinstance(reference, OnnxFile) and engine.manifest.is_quantized:
        raise UsageError(
            f"{artifact.path} is {engine.manifest.precision_name}, and the reference {reference.path} is a file, of "
            "which nothing says how far rounding moves its codes.",
            "Give its bundle, or the model with the ONNX file that it was built from beside the engine.",
        )
    if plugin is not None:
        check_plugin_of(engine, plugin)
    require_runtime(engine)
    return engine


def _against(reference: ModelSpec | OnnxFile | Bundle, checks: Checks, command: str, progress: Progress) -> _Against:
    """Load a reference and its samples."""
    if isinstance(reference, Bundle):
        source = read_sealed_reference(reference.path)
        facts = {"command": command, "reference": f"{REFERENCE}/ of the bundle"}
        return _Against(source, source.samples, StageLog(), facts, recorded=True)
    if isinstance(reference, OnnxFile):
        from scconv_deploy.verification.reference.onnx_file import OnnxReference

        file = OnnxReference(str(reference.path), read_onnx(reference.path), checks.judging.runtime)
        facts = {"command": command, "seed": str(reference.seed), "reference": str(reference.path)}
        return _Against(file, file.samples(reference.seed), StageLog(), facts)
    from scconv_deploy.model.prepare import reference_from_spec

    prepared, log = reference_from_spec(reference, progress)
    samples = checks.samples(prepared, reference.seed, reference.source)
    return _against_model(prepared, checks, samples, log, provenance_of(reference, command, log), progress)


def _against_model(
    reference: Reference,
    checks: Checks,
    samples: list[Iterable[Sample]],
    log: StageLog,
    facts: Mapping[str, str],
    progress: Progress,
) -> _Against:
    from scconv_deploy.verification.reference.pytorch import TorchReference
    from scconv_deploy.verification.samples import with_progress

    here, shards = checks.shared_out(samples, progress)
    source = TorchReference(reference)
    return _Against(source, with_progress(here, progress), log, facts, reference, shards=shards)


def _judge_onnx(artifact: Artifact, against: _Against, checks: Checks, notes: Mapping[str, str]) -> ParityReport:
    if against.reference is None:
        if against.recorded:
            artifact = replace(artifact, quantized=recorded_quantization(artifact))
        judge = partial(verify_artifact, against.source)
    else:
        from scconv_deploy.verification.onnx.parity import verify_onnx

        judge = partial(verify_onnx, against.reference, shards=against.shards)
    return judge(artifact, against.samples, against.log, judging=checks.judging, provenance={**against.facts, **notes})


def _with_notes(link: Link, notes: Mapping[str, str]) -> Link:
    """Add checks to a judged link that name files which differ from the manifest."""
    if link.status == "not run":
        return link
    said = [Check("seal", "not run", f"{what}: {names}") for what, names in notes.items()]
    return Link.of(link.name, [*link.checks, *said])


def models_of(engine: EngineArtifact, *further: Path) -> tuple[SRUModels, dict[str, str]]:
    """Maker of ONNX models of single SRUs, and a line for the report on their origin.

    They are cut out of the file that the engine was built from, if it lies beside the engine or is among ``further``;
    else they are made from the reference's parameters.
    """
    if (path := _built_from(engine, further)) is not None:
        return partial(sru_models.of_artifact, read_onnx(path)), {"SRUs alone": f"out of {path.name}"}
    why = "made from the reference; the ONNX file that the engine was built from is not at hand"
    return partial(_of_site, engine), {"SRUs alone": why}


def _built_from(engine: EngineArtifact, further: Iterable[Path]) -> Path | None:
    """The ONNX file that an engine was built from, beside it or among others; None if it is not at hand."""
    paths = (*sorted(engine.path.parent.glob("*.onnx")), *further)
    return next((p for p in paths if p.is_file() and sha256_of(p) == engine.manifest.onnx_sha256), None)


def _with_codes_of(engine: EngineArtifact, against: _Against) -> ReferenceSource:
    """The reference; a model is fake-quantised as the engine's ONNX file is, if that lies beside an int8 engine."""
    path = _built_from(engine, ()) if engine.manifest.is_quantized else None
    if against.reference is None or path is None:
        return against.source
    from scconv_deploy.verification.onnx.parity import source_of_engine

    return source_of_engine(against.reference, Artifact(read_onnx(path), path.name, path.read_bytes()))


def _of_site(engine: EngineArtifact, site: Site, shape: tuple[int, ...]) -> Models:
    return sru_models.of_site(site, engine.manifest, shape)
