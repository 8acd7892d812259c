"""Judge the artifact of a bundle against the reference that travels with it: no model, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from scconv_deploy.bundle.artifact import artifact_file
from scconv_deploy.bundle.contents import REFERENCE
from scconv_deploy.bundle.reference import read_sealed_reference
from scconv_deploy.report.records import Check, Link, ParityReport, StageLog
from scconv_deploy.verification.chain import Artifact, Judging, verify_artifact
from scconv_deploy.verification.onnx_file import read_onnx


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
