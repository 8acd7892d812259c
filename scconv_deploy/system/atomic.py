"""Writes that happen whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scconv_deploy.errors import UsageError

_PREFIX = ".scconv-deploy."  # of temporary names; not the output's own name, which may be as long as names can be


def check_output_file(path: Path, force: bool) -> None:
    """Refuse, before any work is done, an output that exists or cannot be written (UsageError).

    ``force`` replaces a regular file, nothing else.
    """
    with _as_usage_error(path):
        _check_name(path)
        if path.is_dir():
            example = path / f"model{path.suffix or '.onnx'}"
            raise UsageError(f"{path} is a folder, expected a file.", f"Name a file, for example {example}.")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is no regular file.", "Name another file.")
        if path.exists() and not force:
            raise UsageError(f"{path} exists.", "Add --force to overwrite it.")
        _check_parent(path)


def _check_name(path: Path) -> None:
    if str(path) == "-":
        raise UsageError("The output - would be a file of that name, not stdout.", "Name a file or folder.")


def _check_parent(path: Path) -> None:
    parent = _real(path).parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UsageError(f"{path} cannot be written: {parent} is not a folder.", "Choose another place.")
    with tempfile.TemporaryFile(dir=parent):
        pass


def write_file(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of it (UsageError if it cannot).

    A symbolic link stays one; the file that it points to is replaced.
    """
    with _as_usage_error(path):
        target = _real(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=_PREFIX)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


@contextmanager
def _as_usage_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.", "Choose another place.") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
