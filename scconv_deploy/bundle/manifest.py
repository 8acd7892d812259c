"""Manifest of a bundle: SHA-256 of every file, versions and command; write and check it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from scconv_deploy.bundle.contents import DEVICE, MANIFEST
from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.records.codec import DecodeError, decode, parse
from scconv_deploy.system.environment import sha256_of

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class _SealedFile:
    sha256: str


@dataclass(frozen=True)
class _Sealed:
    """Keys that every manifest has."""

    files: dict[str, _SealedFile]


def manifest_bytes(folder: Path, facts: Mapping[str, Any]) -> bytes:
    """The manifest of the files in a folder.

    Args:
        facts: versions, command and other facts of the bundle, as JSON values.
    """
    files = {name: folder / name for name in _files(folder)}
    document = {
        "schema_version": SCHEMA_VERSION,
        **facts,
        "files": {name: {"sha256": sha256_of(path), "bytes": path.stat().st_size} for name, path in files.items()},
    }
    return (json.dumps(document, indent=2, sort_keys=True) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a bundle's manifest.

    Raises:
        UsageError: there is no such folder, or it is not a bundle.
        IntegrityError: the manifest is damaged, or it names a file outside the folder.
    """
    path = folder / MANIFEST
    if not folder.exists():
        raise UsageError(f"{folder} does not exist.", "Check the path.")
    if not path.is_file():
        raise UsageError(f"{folder} is not a bundle: it has no {MANIFEST}.", "Make one with scconv-deploy deploy.")
    try:
        document: dict[str, Any] = parse(path.read_bytes())
        sealed = decode(_Sealed, document, unknown="ignore").files
    except DecodeError as error:
        raise IntegrityError(f"{path} is damaged or not ours: {error}.", "Make the bundle again.") from error
    outside = [name for name in map(PurePosixPath, sealed) if name.is_absolute() or ".." in name.parts]
    if outside:
        raise IntegrityError(f"{path} names {outside[0]}, which lies outside the bundle.", "Do not use this bundle.")
    return document


def differing_files(folder: Path, manifest: Mapping[str, Any], prefix: str = "") -> tuple[str, ...]:
    """Names of the files that are missing, differ from the manifest, or are not in it.

    Args:
        prefix: only files whose names start with it are checked.

    Raises:
        IntegrityError: a file of the manifest is a link, whatever its content.
    """
    sealed = {name: entry for name, entry in manifest["files"].items() if name.startswith(prefix)}
    _refuse_links(folder, [MANIFEST, *sealed])
    changed = [
        name
        for name, entry in sealed.items()
        if not (folder / name).is_file() or sha256_of(folder / name) != entry["sha256"]
    ]
    extra = [name for name in extra_files(folder, manifest) if name.startswith(prefix)]
    return tuple(sorted([*changed, *extra]))


def _refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Refuse symbolic links, and hard links to files outside the folder, whose content can be changed from there.

    Hard links between files of the folder are allowed.
    """
    remedy = "Replace it by a copy of the file, from where you trust it."
    places = [folder / name for name in (MANIFEST, *_files(folder))]
    stats = [place.lstat() for place in places if not place.is_symlink()]
    within = Counter((stat.st_dev, stat.st_ino) for stat in stats)
    for name in names:
        place = folder
        for part in PurePosixPath(name).parts:
            place = place / part
            if place.is_symlink():
                raise IntegrityError(f"{folder}: {name} is a symbolic link, expected a plain file.", remedy)
        if place.is_file() and (stat := place.stat()).st_nlink > within[stat.st_dev, stat.st_ino]:
            raise IntegrityError(f"{folder}: {name} is a hard link out of the bundle, expected a plain file.", remedy)


def bundle_digest(folder: Path) -> str:
    """Digest of a bundle: the SHA-256 of its manifest."""
    return sha256_of(folder / MANIFEST)


def check_digest(folder: Path, digest: str) -> str:
    """Refuse a bundle with another digest (IntegrityError); "" accepts any. Returns the bundle's digest."""
    read_manifest(folder)
    found = bundle_digest(folder)
    if digest and found != digest.strip().lower():
        raise IntegrityError(
            f"{folder} is not the bundle of digest {digest[:12]}...: its manifest has {found[:12]}....",
            "Copy the bundle again, from where you trust it.",
        )
    return found


def check_bundle(folder: Path, digest: str = "") -> str:
    """Refuse a bundle whose files differ from its manifest, or whose manifest differs from the digest.

    Args:
        digest: as ``deploy`` printed it; "" finds accidents only, no tampering.

    Returns:
        the bundle's digest.

    Raises:
        UsageError: the folder is no bundle.
        IntegrityError: the manifest has another digest, or a file differs from the manifest.
    """
    manifest = read_manifest(folder)
    found = check_digest(folder, digest)
    changed = differing_files(folder, manifest)
    if changed:
        what = "is not the file that was sealed"
        if changed[0] not in manifest["files"]:
            what = f"is not named in {MANIFEST}"
        elif not (folder / changed[0]).is_file():
            what = "is missing"
        more = f", and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise IntegrityError(f"{folder}: {changed[0]} {what}{more}.", "Copy it again; nothing was loaded.")
    return found


def extra_files(folder: Path, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """Files in the folder that neither its manifest nor that of ``device/`` names."""
    known = {*manifest["files"], *_device_files(folder)}
    return tuple(name for name in _files(folder) if name not in known)


def _device_files(folder: Path) -> list[str]:
    """Files that a device added in ``device/``, by the manifest there; the bundle's own was written before."""
    try:
        added = read_manifest(folder / DEVICE)
    except (UsageError, IntegrityError):  # none, or none that could be trusted
        return []
    return [f"{DEVICE}/{name}" for name in (*added["files"], MANIFEST)]


def _files(folder: Path) -> list[str]:
    """Every file below a folder but its manifest, as POSIX paths from it."""
    found = (p for p in folder.rglob("*") if (p.is_symlink() or not p.is_dir()) and p != folder / MANIFEST)
    return sorted(p.relative_to(folder).as_posix() for p in found)
