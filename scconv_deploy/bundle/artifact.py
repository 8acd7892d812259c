"""The ONNX file of a bundle."""

from __future__ import annotations

from pathlib import Path

from scconv_deploy.bundle.contents import MODEL, REJECTED
from scconv_deploy.bundle.manifest import differing_files, read_manifest
from scconv_deploy.errors import UsageError


def bundled_model(bundle: Path) -> tuple[Path, dict[str, str]]:
    """Path of a bundle's ONNX file, and a note for the report if files differ from the manifest.

    Raises:
        UsageError: the folder is no bundle, or holds no ONNX file.
    """
    manifest = read_manifest(bundle)
    path = next((bundle / n for n in (MODEL, MODEL + REJECTED) if (bundle / n).is_file()), None)
    if path is None:
        raise UsageError(
            f"{bundle} holds no {MODEL}, which every bundle has.",
            "Copy the bundle again, or give the ONNX file itself.",
        )
    changed = differing_files(bundle, manifest)
    return path, {"files that differ from the manifest": ", ".join(changed)} if changed else {}
