"""One cell of a run: a model in a variant, made in a process of its own, on this machine or on another one.

What a cell names (files of code, weights, data) travels to another machine by its SHA-256, and the bundle comes back as
an archive. There the same names lead to the same content, so that the bundle does not tell where it was made.
"""

from __future__ import annotations

import io
import os
import shlex
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from scconv_deploy.errors import UsageError
from scconv_deploy.records.run import Inputs
from scconv_deploy.records.stage import Progress
from scconv_deploy.system.inputs import OpenedFiles, code_files, digest_of, packages, read_files, relative
from scconv_deploy.workers.tasks import Parcel, Workers

LARGEST_BYTES = 2 << 30
"""Largest file or folder that is sent; larger ones must lie at the same path on every machine."""
Make = Callable[[Sequence[str], Path, str, Progress, Workers | None], None]
"""(arguments of ``deploy`` without its output, folder, command line, progress, workers for large data): write the
bundle."""


@dataclass(frozen=True)
class Cell:
    """A model in a variant.

    Attributes:
        model, variant: names in the run file.
        arguments: arguments of ``deploy``, without its output.
        named: files and folders that the arguments name.
        open_ended: whether it reads what cannot be hashed, a loader's data.
    """

    model: str
    variant: str
    arguments: tuple[str, ...]
    named: tuple[str, ...] = ()
    open_ended: bool = False

    @property
    def name(self) -> str:
        return f"{self.model}/{self.variant}"

    def command(self, output: Path) -> str:
        """Command line that makes the same bundle."""
        return shlex.join(["scconv-deploy", "deploy", *self.arguments, "-o", str(output / self.model / self.variant)])


@dataclass(frozen=True)
class Made:
    """What a process says of the cell that it made.

    Attributes:
        packed: the bundle as a tar archive, where it was made on another machine.
    """

    inputs: Inputs
    packed: bytes = b""


def make_cell(
    make: Make, cell: Cell, folder: str, command: str, progress: Progress, workers: Workers | None = None
) -> Made:
    """Make a cell's bundle, and note what it was made from; runs in a process of its own."""
    before = {path: digest_of(Path(path)) for path in cell.named}
    with OpenedFiles().recording() as opened:
        make(cell.arguments, Path(folder), command, progress, workers)
    named = [Path(path).resolve() for path in cell.named]
    more = {
        path
        for path in code_files() | read_files(opened)
        if not any(path.is_relative_to(folder) for folder in (*named, Path(folder).resolve().parent))
    }
    files = before | {path: digest_of(Path(path)) for path in relative(more)}
    return Made(Inputs(files, packages(), cell.open_ended))


@dataclass(frozen=True)
class Luggage:
    """Files and folders that a cell names, for another machine.

    Attributes:
        folder: current folder here.
        digests: SHA-256 of each path.
        archives: the content of each path as a tar archive; without those that are too large.
    """

    folder: str
    digests: Mapping[str, str]
    archives: Mapping[str, Parcel]


@contextmanager
def luggage_for(cells: Iterable[Cell], workers: Workers) -> Iterator[dict[str, Luggage]]:
    """Share what cells name with workers on other machines, each content once; nothing for workers of this machine."""
    found: dict[str, Luggage] = {}
    archives: dict[str, Parcel] = {}
    digests: dict[str, str] = {}
    with ExitStack() as stack:
        for cell in cells if workers.elsewhere else ():
            for path in cell.named:
                if path not in digests:
                    digests[path] = digest_of(Path(path))
                    content = _packed(Path(path))
                    if content:
                        archives[path] = stack.enter_context(workers.sharing(content))
            found[cell.name] = Luggage(
                os.getcwd(),
                {path: digests[path] for path in cell.named},
                {path: archives[path] for path in cell.named if path in archives},
            )
        yield found


def make_there(
    make: Make, cell: Cell, command: str, luggage: Luggage, workers: Workers | None, progress: Progress
) -> Made:
    """Make a cell's bundle on another machine; it comes back as an archive.

    Args:
        workers: workers for the rows of large data.
    """
    with tempfile.TemporaryDirectory(prefix="scconv-deploy.") as temporary:
        place, bundle = Path(temporary) / "work", Path(temporary) / "made" / "bundle"
        place.mkdir()
        os.chdir(_folder_with(luggage, place))
        made = make_cell(make, cell, str(bundle), command, progress, workers)
        own = {path: digest for path, digest in made.inputs.files.items() if not Path(path).is_relative_to(temporary)}
        inputs = replace(made.inputs, files=own | dict(luggage.digests))
        os.chdir(luggage.folder if Path(luggage.folder).is_dir() else "/")
        return Made(inputs, pack(bundle))


def _folder_with(luggage: Luggage, place: Path) -> Path:
    """A folder in which all paths lead to their content: the same one as there, or ``place``, where it is unpacked."""
    there = Path(luggage.folder)
    if all(digest_of(there / path) == digest for path, digest in luggage.digests.items()):
        return there if there.is_dir() else place
    for path, digest in luggage.digests.items():
        if digest_of(place / path) == digest:  # an absolute path, or beside one that was unpacked
            continue
        if path not in luggage.archives or Path(path).is_absolute() or ".." in Path(path).parts:
            raise UsageError(
                f"{path} is not on this machine, and cannot be sent to it.",
                "Name it by a path below the current folder, of at most 2 GiB; or put it there on every machine.",
            )
        unpack(luggage.archives[path].content(), (place / path).parent)
    return place


def _packed(path: Path) -> bytes:
    """A file or folder as a tar archive, relative to its parent; with a file of Python those beside and below it.

    Empty if there is no such file, or if it is too large.
    """
    if path.suffix == ".py" and path.is_file():
        files = [path, *_modules(path.parent, path)]
    else:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    if not files or sum(file.stat().st_size for file in files) > LARGEST_BYTES:
        return b""
    return _archive({file.relative_to(path.parent).as_posix(): file for file in files})


def _modules(folder: Path, but: Path) -> Iterator[Path]:
    """Files of Python below a folder, without hidden folders and virtual environments."""
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.name.startswith((".", "__")) and not (entry / "pyvenv.cfg").exists():
            yield from _modules(entry, but)
        elif entry.suffix == ".py" and entry.is_file() and entry != but:
            yield entry


def pack(folder: Path) -> bytes:
    """A folder as a tar archive, relative to itself."""
    return _archive({p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()})


def _archive(files: Mapping[str, Path]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, file in files.items():
            archive.add(file, name)
    return stream.getvalue()


def unpack(content: bytes, folder: Path) -> None:
    """Unpack :func:`pack` into a folder; nothing is written outside it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
