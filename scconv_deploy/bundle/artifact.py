"""The ONNX file of an artifact, whether it is one or lies in a bundle."""

from __future__ import annotations

from pathlib import Path

from scconv_deploy.bundle.contents import MODEL, REJECTED
from scconv_deploy.bundle.manifest import differing_files, read_manifest
from scconv_deploy.errors import UsageError


def artifact_file(artifact: Path) -> tuple[Path, dict[str, str]]:
    """The ONNX file of an artifact. One whose bytes differ from its manifest is judged all the same, with a note."""
    if not artifact.is_dir():
        return artifact, {}
    manifest = read_manifest(artifact)
    path = next((artifact / n for n in (MODEL, MODEL + REJECTED) if (artifact / n).is_file()), None)
    if path is None:
        raise UsageError(
            f"{artifact} holds no {MODEL}, which every bundle has.",
            "Copy the bundle again, or give the ONNX file itself.",
        )
    changed = differing_files(artifact, manifest)
    return path, {"files that differ from the manifest": ", ".join(changed)} if changed else {}
