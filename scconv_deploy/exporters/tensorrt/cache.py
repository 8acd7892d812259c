"""Cache of built engines, keyed by everything that a build depends on.

Each entry is a folder, written beside its place and renamed into it. Two builds that race for one entry both succeed:
the first rename wins, the second finds the place taken and drops its own. There is no lock that a killed process could
leave; its temporary folder is never read, and removed after a day.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact, EngineManifest, load_engine, sidecar, write_engine
from scconv_deploy.system.atomic import write_file
from scconv_deploy.system.environment import cache_folder, sha256_of

_ENGINE, _ENTRY = "model.engine", "entry.json"
_PREFIX = ".scconv-deploy."
_STALE_S = 24 * 3600


@dataclass(frozen=True)
class EngineCache:
    """A folder of engines.

    Attributes:
        folder: made at the first write.
        chosen: whether the user named it, so that failures are errors; the default one fails with a note.
    """

    folder: Path
    chosen: bool = False

    @classmethod
    def default(cls) -> EngineCache:
        """The cache in :func:`.system.environment.cache_folder`."""
        return cls(cache_folder())

    def check(self) -> str:
        """Check that the cache can be written. Returns the reason if not, else "".

        Raises:
            UsageError: it cannot be written, and the user chose it.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            reason = f"the cache {self.folder} cannot be written: {error.strerror or error}"
            if self.chosen:
                raise UsageError(
                    f"{reason[0].upper()}{reason[1:]}.", "Choose another --cache, or --no-cache."
                ) from error
            return reason
        return ""

    def find(self, key: str) -> tuple[EngineArtifact | None, str]:
        """The engine stored under a key (None without one) and a note; a damaged or misplaced entry is removed."""
        place = self._place(key)
        try:
            if not place.is_dir():
                return None, ""
            found = load_engine(place / _ENGINE)
            if not _is_of(place, key):
                raise IntegrityError(f"{place} holds the engine of another build.", "Build it again.")
            return found, ""
        except (IntegrityError, UsageError) as error:
            shutil.rmtree(place, ignore_errors=True)
            return None, f"a damaged entry of the cache was dropped: {error.message}"
        except OSError as error:
            return None, f"the cache {self.folder} cannot be read: {error.strerror or error}"

    def store(self, key: str, data: bytes, manifest: EngineManifest) -> str:
        """Store an engine.

        Returns:
            why it could not be stored, "" if it was, or another process stored the same meanwhile.
        """
        place = self._place(key)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            self._sweep(place.parent)
            temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=_PREFIX))
        except OSError as error:
            return f"not kept in the cache {self.folder}: {error.strerror or error}"
        try:
            engine = write_engine(temporary / _ENGINE, data, manifest)
            write_file(temporary / _ENTRY, _entry_of(engine.path, key))
            with suppress(FileExistsError):  # of two that race, the first wins
                _rename_new(temporary, place)
        except (OSError, UsageError) as error:
            return f"not kept in the cache {self.folder}: {error}"
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return ""

    def timing_file(self, key: str) -> Path:
        """Path of the timing cache for one library version on one GPU."""
        return self.folder / "timing" / f"{key}.cache"

    def _place(self, key: str) -> Path:
        return self.folder / "engines" / key

    @staticmethod
    def _sweep(folder: Path) -> None:
        """Remove temporary folders of killed processes; a build takes less than a day."""
        for left in folder.glob(f"{_PREFIX}*"):
            with suppress(OSError):  # another process may be removing it as well
                if time.time() - left.stat().st_mtime > _STALE_S:
                    shutil.rmtree(left, ignore_errors=True)


def _entry_of(engine: Path, key: str) -> bytes:
    """Content of ``entry.json``, which binds an engine to its key; engine and manifest do not hold the key."""
    manifest = sha256_of(sidecar(engine))
    return (json.dumps({"key": key, "manifest_sha256": manifest}) + "\n").encode()


def _is_of(place: Path, key: str) -> bool:
    """Whether an entry, with its engine, was stored under this key."""
    entry = place / _ENTRY
    return entry.is_file() and entry.read_bytes() == _entry_of(place / _ENGINE, key)


def _rename_new(temporary: Path, place: Path) -> None:
    try:
        os.rename(temporary, place)
    except OSError as error:
        if place.is_dir():  # POSIX says ENOTEMPTY or EEXIST, Windows refuses access
            raise FileExistsError(str(place)) from error
        raise


def entry_key(facts: Mapping[str, Any]) -> str:
    """SHA-256 of everything that a build depends on, given as JSON values."""
    return sha256_of(json.dumps(facts, sort_keys=True).encode())


def read_timing(path: Path) -> bytes:
    """Bytes of a timing cache; empty if there is no file yet."""
    return path.read_bytes() if path.is_file() else b""


def write_timing(path: Path, data: bytes) -> None:
    """Write a timing cache atomically; of two builds, the last one's stays."""
    write_file(path, data)
