"""Bundle folders: checked before any work, written atomically."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from scconv_deploy.bundle.manifest import extra_files, read_manifest
from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.system.atomic import _PREFIX, _as_usage_error, _check_name, _check_parent, _real, _umask


def check_output_folder(path: Path, force: bool) -> None:
    """Refuse, before any work is done, a folder that exists or cannot be made (UsageError).

    ``force`` replaces an earlier bundle; it never deletes a folder that holds anything else.
    """
    with _as_usage_error(path):
        _check_name(path)
        if path.exists() and not path.is_dir():
            raise UsageError(f"{path} is a file, expected a folder.", "Name a new folder.")
        if path.is_dir() and path.samefile(Path.cwd()):
            raise UsageError(f"{path} is the current folder, which cannot be replaced.", "Name a new folder.")
        if path.is_dir() and any(path.iterdir()):
            _check_bundle(path)
            if not force:
                raise UsageError(f"{path} exists.", "Add --force to replace it.")
        _check_parent(path)


def _check_bundle(path: Path) -> None:
    """Refuse to replace a folder that is no bundle, or holds other files (UsageError).

    A file named ``manifest.json`` proves nothing: browser extensions have one too.
    """
    try:
        manifest = read_manifest(path)
    except (UsageError, IntegrityError) as error:
        raise UsageError(f"{path} exists and is not a bundle.", "Name a new folder.") from error
    if foreign := extra_files(path, manifest):
        raise UsageError(
            f"{path} exists and holds more than the bundle: {', '.join(foreign[:3])}.", "Name a new folder."
        )


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path`` that takes its place when the block ends well, and vanishes otherwise."""
    target = _real(path)
    with _as_usage_error(path):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=_PREFIX))
    try:
        yield temporary
        with _as_usage_error(path):
            os.chmod(temporary, 0o777 & ~_umask())
            _replace_folder(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder in ``parent``, on its file system, that vanishes with all that is left in it."""
    with _as_usage_error(parent):
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=_PREFIX))
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make a folder and keep other processes of this kind out of it during the block.

    Nothing is left behind: the system frees the lock when the process ends, however it ends. File systems without locks
    (some of those on a network) are taken as they are, and so is Windows.

    Raises:
        UsageError: another process has the folder, or it cannot be made.
    """
    with _as_usage_error(path):
        path.mkdir(parents=True, exist_ok=True)
        handle = None if fcntl is None else os.open(path, os.O_RDONLY)
    if handle is None:
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"{path} is in use: another run writes into it.", "Wait for it to end, or name another folder."
            ) from error
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)


def place_folder(made: Path, place: Path) -> None:
    """Move a folder that is whole to its place on the same file system (UsageError if it cannot)."""
    with _as_usage_error(place):
        target = _real(place)
        target.parent.mkdir(parents=True, exist_ok=True)
        _replace_folder(made, target)


def _replace_folder(new: Path, target: Path) -> None:
    """Rename the new folder to the target; an existing one is moved aside first, and deleted afterwards."""
    if not target.exists():
        os.replace(new, target)
        return
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=_PREFIX))
    try:
        os.replace(target, aside / "old")
        os.replace(new, target)
    except BaseException:
        if not target.exists():
            os.replace(aside / "old", target)
        shutil.rmtree(aside)
        raise
    # ignore_errors: a remnant of the old folder must not turn a success into a failure
    shutil.rmtree(aside, ignore_errors=True)
