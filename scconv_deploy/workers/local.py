"""Tasks in processes of this machine, each of its own, with bounded threads. Standard library only.

A process is forked from one that has imported the heavy libraries already, so it starts at once. What a task does to
its process (a crash, memory, modules of the user) ends with it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection, forkserver
from pathlib import Path
from typing import Any

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.system.failures import Failure
from scconv_deploy.system.memory import available_bytes, usable_cores
from scconv_deploy.system.signals import Signals
from scconv_deploy.workers.tasks import Admission, Outcome, Task, Tell, attempt, bound_threads, thread_settings

_PATIENCE_S = 20.0
"""Time that a process has to remove its temporary files after SIGTERM."""
_TAIL_LINES = 20
"""Last lines of a lost process's output that its failure shows."""
_LOOK_S = 0.2  # how soon a signal is noticed while no task says anything


@dataclass(frozen=True)
class FileParcel:
    """Shared bytes in a file, with their SHA-256."""

    path: Path
    sha256: str

    def content(self) -> bytes:
        return self.path.read_bytes()


@dataclass
class _Running:
    task: Task
    process: Any
    output: Any


class LocalWorkers:
    """Processes of this machine; see :class:`.tasks.Workers`.

    Args:
        jobs: number of tasks at a time; None takes one a core.
        preload: modules that every process needs; they are imported once.

    Attributes:
        threads: threads of each process: its share of the cores.
    """

    def __init__(self, jobs: int | None = None, preload: Sequence[str] = ()) -> None:
        cores = usable_cores()
        self.jobs = jobs or cores
        self.threads = max(1, cores // self.jobs)
        self._preload = list(preload)

    elsewhere = False
    within = None

    @contextmanager
    def sharing(self, content: bytes) -> Iterator[FileParcel]:
        """Share bytes by a temporary file."""
        with tempfile.NamedTemporaryFile(prefix="scconv-deploy.") as file:
            file.write(content)
            file.flush()
            yield FileParcel(Path(file.name), sha256_of(content))

    def run(self, tasks: Sequence[Task], tell: Tell) -> Generator[Outcome]:
        context = _context(self._preload, self.threads)
        admission = Admission(self.jobs, available_bytes())
        waiting, running = list(tasks), dict[connection.Connection, _Running]()
        try:
            while waiting or running:
                while waiting and admission.admits(waiting[0]):
                    task = waiting.pop(0)
                    admission.start(task)
                    reader, one = self._start(context, task)
                    running[reader] = one
                    tell(task.name, "starting")
                ready = connection.wait(list(running), _LOOK_S)
                for reader in [one for one in running if one in ready]:
                    outcome = _received(reader, running[reader], tell)
                    if outcome is not None:
                        del running[reader]
                        admission.end(outcome)
                        yield outcome
                tell("", "")  # a chance to notice a signal
        finally:
            _end(running.values())

    def _start(self, context: Any, task: Task) -> tuple[connection.Connection, _Running]:
        reader, writer = context.Pipe(duplex=False)
        output = tempfile.NamedTemporaryFile(prefix="scconv-deploy.", suffix=".log")  # noqa: SIM115  (until it ends)
        process = context.Process(
            target=_serve, args=(writer, task, self.threads, os.getcwd(), output.name), name=task.name, daemon=False
        )
        process.start()
        writer.close()  # the process has its own: when it ends, reading ends
        return reader, _Running(task, process, output)


def _context(preload: Sequence[str], threads: int) -> Any:
    """Context that forks from a process with the modules loaded; where there is none (Windows), one that spawns."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with _environment(thread_settings(threads)), _ignored_interrupts():  # libraries start threads when imported
        forkserver.ensure_running()
    return context


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _ignored_interrupts() -> Iterator[None]:
    """Start a process that ignores Ctrl-C, which the terminal sends to it too: this one decides."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    kept = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, kept)


def _serve(writer: connection.Connection, task: Task, threads: int, folder: str, output: str) -> None:
    """Run a task in a process of its own, and send what it says and its outcome."""
    signals = Signals.install("scconv-deploy")  # SIGTERM raises, so that temporary files go
    signals.begin()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the one that began them decides
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    bound_threads(threads)

    def tell(name: str, text: str) -> None:
        with suppress(OSError):  # nobody listens any more
            writer.send(text)

    outcome = attempt(task, tell)
    with suppress(OSError):
        writer.send(outcome)


def _received(reader: connection.Connection, one: _Running, tell: Tell) -> Outcome | None:
    """Next message of a process: its outcome if it has ended, None if it goes on."""
    try:
        message = reader.recv()
    except (EOFError, OSError):
        one.process.join()
        return Outcome(one.task.name, failure=_lost(one))
    if not isinstance(message, Outcome):
        tell(one.task.name, message)
        return None
    one.process.join()
    reader.close()
    one.output.close()
    return message


def _lost(one: _Running) -> Failure:
    """Why a process ended without an outcome."""
    lines = Path(one.output.name).read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
    one.output.close()
    code = one.process.exitcode or 0
    if code != -signal.SIGKILL:
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        remedy = "Look at the lines above; run its command alone to see more."
        return Failure(1, f"Its process ended {how}.", remedy, "\n".join(lines))
    message = "Its process was killed, as the system does when memory ends."
    return Failure(MissingRuntimeError.exit_code, message, "Use fewer --jobs, or more memory.", "\n".join(lines))


def _end(running: Iterable[_Running]) -> None:
    """End processes: SIGTERM lets them remove their temporary files, SIGKILL follows."""
    left = list(running)
    for one in left:
        one.process.terminate()
    for one in left:
        one.process.join(_PATIENCE_S)
        if one.process.is_alive():
            one.process.kill()
            one.process.join()
        one.output.close()
