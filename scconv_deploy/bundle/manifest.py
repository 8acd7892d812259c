"""The bundle's seal: SHA-256 of every file, versions and command."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scconv_deploy.errors import IntegrityError, UsageError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1


def sha256(path: Path) -> str:
    """Of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def manifest_bytes(folder: Path, facts: Mapping[str, Any]) -> bytes:
    """The manifest of the files in a folder.

    Args:
        facts: versions, command and whatever else belongs to the bundle, as JSON values.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    document = {
        "schema_version": SCHEMA_VERSION,
        **facts,
        "files": {p.relative_to(folder).as_posix(): {"sha256": sha256(p), "bytes": p.stat().st_size} for p in files},
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a bundle's manifest.

    Raises:
        UsageError: the folder is not a bundle.
        IntegrityError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageError(f"{folder} is not a bundle: it has no {MANIFEST}.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        files = document["files"]
        if not all(isinstance(entry["sha256"], str) for entry in files.values()):
            raise TypeError("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{path} is damaged.", "Make the bundle again.") from error
    return document


def differing_files(folder: Path, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Files that are missing or whose bytes are not the ones that were sealed."""
    return tuple(
        name
        for name, entry in sorted(manifest["files"].items())
        if not (folder / name).is_file() or sha256(folder / name) != entry["sha256"]
    )
