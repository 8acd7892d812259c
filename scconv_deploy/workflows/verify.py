"""Verify an ONNX file against its PyTorch model, another ONNX file or a bundle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from scconv_deploy.bundle.artifact import artifact_file
from scconv_deploy.bundle.contents import REFERENCE
from scconv_deploy.bundle.reference import read_sealed_reference
from scconv_deploy.graph.file import read_onnx
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.model.prepare import reference_from_module, reference_from_spec
from scconv_deploy.model.spec import ModelSpec
from scconv_deploy.records import tolerances
from scconv_deploy.records.parity import Check, Link, ParityReport
from scconv_deploy.records.stage import Progress, StageLog, silent
from scconv_deploy.verification.onnx.chain import Artifact, Judging, verify_artifact
from scconv_deploy.verification.onnx.parity import verify_onnx
from scconv_deploy.verification.options import Checks
from scconv_deploy.verification.reference.onnx_file import OnnxReference
from scconv_deploy.verification.samples import with_progress
from scconv_deploy.workflows.provenance import provenance_of
from scconv_deploy.zoo.embed import EmbedResult


def verify_spec(
    artifact: Path,
    spec: ModelSpec,
    *,
    checks: Checks = Checks(),
    command: str = "",
    progress: Progress = silent,
) -> ParityReport:
    """``scconv-deploy verify``: judge an ONNX file, or the one in a bundle, against a model."""
    tolerances.table(checks.tolerances)
    path, notes = artifact_file(artifact)
    proto = read_onnx(path)
    reference, log = reference_from_spec(spec, progress)
    samples = with_progress(checks.samples(reference, spec.seed, spec.source), progress)
    return verify_onnx(
        reference, Artifact(proto, str(path), path.read_bytes()), samples, log,
        judging=checks.judging, provenance=provenance_of(spec, command, log) | notes,
    )  # fmt: skip


def verify(
    artifact: str | Path,
    model: nn.Module | EmbedResult,
    example_inputs: Any,
    *,
    dynamic: Sequence[DynamicAxis] = (),
    checks: Checks = Checks(),
) -> ParityReport:
    """Judge an ONNX file, or the one in a bundle, against a module; arguments as for :func:`deploy`.

    Returns:
        The report, falsy when parity failed.
    """
    path, notes = artifact_file(Path(artifact))
    proto = read_onnx(path)
    reference, log = reference_from_module(model, example_inputs, dynamic)
    samples = with_progress(checks.samples(reference, 0), silent)
    artifact_read = Artifact(proto, str(path), path.read_bytes())
    return verify_onnx(reference, artifact_read, samples, log, judging=checks.judging, provenance=notes)


def verify_bundle(
    bundle: Path,
    *,
    judging: Judging = Judging(),
    command: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """``scconv-deploy verify BUNDLE``.

    Returns:
        The report; falsy when a check failed.

    Raises:
        UsageError: it is not a bundle, or has no ``reference/``.
        IntegrityError: a file of ``reference/`` is not the one that was sealed: nothing can be judged by it.
    """
    path, notes = artifact_file(bundle)
    source = read_sealed_reference(bundle)
    proto = read_onnx(path)
    progress(f"verifying {path.name} against {REFERENCE}/")
    report = verify_artifact(
        source,
        Artifact(proto, str(path), path.read_bytes()),
        source.samples,
        StageLog(),
        judging=judging,
        provenance={"command": command, "reference": f"{REFERENCE}/ of the bundle"} | notes,
    )
    return report if not notes else replace(report, links=tuple(_with_notes(link, notes) for link in report.links))


def _with_notes(link: Link, notes: Mapping[str, str]) -> Link:
    """A judged link says what the manifest does not vouch for: without the model, samples alone judge weights."""
    if link.status == "not run":
        return link
    said = [Check("seal", "not run", f"{what}: {names}") for what, names in notes.items()]
    return Link.of(link.name, [*link.checks, *said])


def verify_against_onnx(
    artifact: Path, reference: Path, *, seed: int = 0, judging: Judging = Judging(), command: str = ""
) -> ParityReport:
    """``scconv-deploy verify ARTIFACT --reference REF.onnx``.

    Raises:
        UsageError, IntegrityError: a file is missing or damaged.
        ModelError: ONNX Runtime refuses one.
    """
    path, notes = artifact_file(artifact)
    source = OnnxReference(str(reference), read_onnx(reference), judging.runtime)
    proto = read_onnx(path)
    provenance: Mapping[str, str] = {"command": command, "seed": str(seed), "reference": str(reference)} | notes
    return verify_artifact(
        source, Artifact(proto, str(path), path.read_bytes()), source.samples(seed), StageLog(),
        judging=judging, provenance=provenance,
    )  # fmt: skip
