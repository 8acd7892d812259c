"""What a process read: named files, imported code, opened files, installed packages. Standard library only."""

from __future__ import annotations

import functools
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from scconv_deploy.system.environment import cache_folder, sha256_of

PACKAGE = "scconv-deploy"
_OWN = Path(__file__).resolve().parents[1]
_DEVICES = (Path("/proc"), Path("/sys"), Path("/dev"))


def digest_of(path: Path) -> str:
    """SHA-256 of a file, or of a folder: of the names and contents of all files below it; "" if there is none."""
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        return ""
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and "__pycache__" not in p.parts]
    return sha256_of("".join(f"{sha256_of(p)} {p.relative_to(path).as_posix()}\n" for p in files).encode())


class OpenedFiles:
    """Files that this process opened for reading and for writing while :meth:`recording`.

    Python reports what it opens itself, code in other languages does not.
    """

    def __init__(self) -> None:
        self.read: set[str] = set()
        self.written: set[str] = set()

    @contextmanager
    def recording(self) -> Iterator[OpenedFiles]:
        """Record until the block ends."""
        recorders = _recorders()
        recorders.append(self)
        try:
            yield self
        finally:
            recorders.remove(self)

    def add(self, path: Any, mode: Any, flags: Any) -> None:
        """Add a file as the audit event ``open`` names it."""
        if isinstance(path, (str, bytes)):
            writes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR))
            (self.written if writes else self.read).add(os.path.abspath(os.fsdecode(path)))


@functools.cache
def _recorders() -> list[OpenedFiles]:
    """Recorders of this process, and the hook that feeds them; an audit hook cannot be removed."""
    active: list[OpenedFiles] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event == "open":
            for recorder in active:
                recorder.add(*arguments)

    sys.addaudithook(hook)
    return active


def code_modules() -> list[ModuleType]:
    """Imported modules that no installed package and no standard library holds: the user's code."""
    return [module for module in list(sys.modules.values()) if _file_of(module) is not None]


def code_files() -> set[Path]:
    """Files of :func:`code_modules`."""
    return {file for module in list(sys.modules.values()) if (file := _file_of(module)) is not None}


def _file_of(module: ModuleType) -> Path | None:
    name = getattr(module, "__file__", None)
    if not isinstance(name, str) or _installed(Path(name)):  # most are: no need to follow links
        return None
    file = Path(name).resolve()
    return file if file.is_file() and not _installed(file) else None


def read_files(opened: OpenedFiles) -> set[Path]:
    """Files that were read and not written, without installed packages, caches and devices."""
    found = {Path(name) for name in opened.read - opened.written}
    cache = cache_folder().parent.resolve()
    return {
        path
        for path in found
        if path.suffix != ".pyc" and path.is_file() and not _installed(path) and not path.is_relative_to(cache)
    }


def packages() -> dict[str, str]:
    """Installed packages that this process has imported, each with :func:`package_digest`."""
    tops = {name.partition(".")[0] for name in sys.modules}
    names = {package for top in tops for package in _by_module().get(top, ())}
    return {name: package_digest(name) for name in sorted({*names, PACKAGE})}


@functools.cache
def _by_module() -> Mapping[str, list[str]]:
    """Installed packages by the modules that they hold."""
    return metadata.packages_distributions()


@functools.cache
def package_digest(name: str) -> str:
    """SHA-256 of an installed package's list of files with their hashes, or its version without one; "" if missing.

    This package is hashed by its files, which an editable installation does not list.
    """
    if name == PACKAGE:
        return _own_digest()
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return ""
    record = found.read_text("RECORD")
    return sha256_of((record or found.version).encode())


def relative(paths: Iterable[Path]) -> list[str]:
    """Paths as text, from the current folder where they lie below it."""
    here = Path.cwd()
    return sorted(str(path.relative_to(here) if path.is_relative_to(here) else path) for path in paths)


@functools.cache
def _own_digest() -> str:
    return digest_of(_OWN)


@functools.cache
def _places() -> tuple[Path, ...]:
    """Folders of the interpreter, its packages, and devices."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    paths += [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    if sys.prefix != sys.base_prefix:  # a virtual environment
        paths.append(sys.prefix)
    return (*(Path(path).resolve() for path in paths if path), _OWN, *_DEVICES)


def _installed(path: Path) -> bool:
    return str(path).startswith(_prefixes())


@functools.cache
def _prefixes() -> tuple[str, ...]:
    return tuple(f"{place}{os.sep}" for place in _places())
