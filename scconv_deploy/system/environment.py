"""This installation: versions, platform, SHA-256 of content, and the cache folder. Standard library only."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from scconv_deploy.version import __version__

_PIECE_BYTES = 1 << 20


def sha256_of(content: bytes | Path) -> str:
    """SHA-256 of bytes, or of a file, which is read in pieces; 64 hexadecimal digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    digest = hashlib.sha256()
    with content.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """``$XDG_CACHE_HOME/scconv-deploy``, or ``~/.cache/scconv-deploy``: engines, timing caches, plugins."""
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "scconv-deploy"


def installed_version(package: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def bound_of_threads(environ: Mapping[str, str] = os.environ) -> int:
    """Threads that ``OMP_NUM_THREADS`` allows a process; 0 where it says nothing."""
    first = environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return int(first) if first.isdigit() else 0


def platform_facts() -> dict[str, str]:
    """Python's version, and the operating system with the processor."""
    return {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}


def environment_facts() -> dict[str, str]:
    """Versions and machine for every report: scconv-deploy, Python, operating system."""
    return {"scconv_deploy": __version__, **platform_facts()}
