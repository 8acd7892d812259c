"""Writes that happen whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scconv_deploy.bundle.manifest import MANIFEST
from scconv_deploy.errors import UsageError


def check_output_file(path: Path, force: bool) -> None:
    """Refuse, before any work is done, an output that exists or cannot be written (UsageError)."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder, expected a file.", "Name a file, for example model.onnx.")
    if path.exists() and not force:
        raise UsageError(f"{path} exists.", "Add --force to overwrite it.")
    _check_parent(path)


def check_output_folder(path: Path, force: bool) -> None:
    """Refuse, before any work is done, a folder that exists or cannot be made.

    ``force`` replaces an earlier bundle or an empty folder; it never deletes a folder that holds anything else.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, expected a folder.")
    if path.is_dir() and any(path.iterdir()):
        if not (path / MANIFEST).is_file():
            raise UsageError(f"{path} exists and is not a bundle.", "Choose a new folder.")
        if not force:
            raise UsageError(f"{path} exists.", "Add --force to replace it.")
    _check_parent(path)


def _check_parent(path: Path) -> None:
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"{parent} is not a folder, so {path} cannot be written.")
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", "Choose another folder.") from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it (UsageError if it cannot)."""
    handle = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException as error:
        if handle is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UsageError(f"{path} cannot be written: {error.strerror}.", "Choose another place.") from error
        raise


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends well, and vanishes otherwise."""
    path = path.absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}.", "Choose another folder.") from error
    try:
        yield temporary
        os.chmod(temporary, 0o777 & ~_umask())
        if path.exists():
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.old.") as old:
                os.replace(path, Path(old) / "bundle")
                os.replace(temporary, path)
        else:
            os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
