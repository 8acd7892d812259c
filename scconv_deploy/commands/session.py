"""Session of a command: results to stdout, progress to stderr, and every error as one line with its exit code."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TextIO

import typer

from scconv_deploy.system.failures import failure_of, report_failure
from scconv_deploy.system.progress_lines import LogLines, Notice
from scconv_deploy.system.signals import BROKEN_PIPE, installed
from scconv_deploy.system.streams import flush

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status


PROGRAM = "scconv-deploy"


def command_line() -> str:
    """The running command, quoted for a shell."""
    return shlex.join([PROGRAM, *sys.argv[1:]])


class Session:
    """Output of one command: results to stdout, progress to stderr.

    Attributes:
        shown: whether the result was printed, or stdout is closed.
        unread: whether the reader of stdout has closed it.
    """

    def __init__(self, stdout: TextIO, progress: Status | LogLines | None, as_json: bool, quiet: bool) -> None:
        self._stdout = stdout
        self._progress = progress
        self._json = as_json
        self._quiet = quiet
        self.shown = False
        self.unread = False

    def progress(self, message: str) -> None:
        """Show a progress message, which the next one replaces; a notice stays."""
        if isinstance(message, Notice):
            self._notice(message)
        elif isinstance(self._progress, LogLines):
            self._progress(message)
        elif self._progress is not None:
            from rich.text import Text

            self._progress.update(Text(message))
        if (signals := installed()) is not None:
            signals.check()

    def _notice(self, message: Notice) -> None:
        """Print a line on stderr, above the progress if there is one."""
        if self._quiet:
            return
        line = " ".join(message.split())
        if self._progress is None or isinstance(self._progress, LogLines):
            with suppress(OSError):  # stderr is closed: go on
                typer.echo(line, err=True)
        else:
            from rich.text import Text

            self._progress.console.print(Text(line), soft_wrap=True)

    def show(self, result: Any, printer: Callable[[Console, Any], None]) -> None:
        """Print a result as JSON (``--json``), or as text with ``printer``; nothing with ``--quiet``."""
        if self._json:
            self.write(json.dumps(result.as_json(), indent=2) + "\n")
        elif not self._quiet:
            self._print(lambda: printer(_console(self._stdout), result))
        self.shown = True

    def write(self, document: str) -> None:
        """Print a document unchanged."""
        self._print(lambda: self._stdout.write(document))
        self.shown = True

    def _print(self, write: Callable[[], object]) -> None:
        """Print; go on if the pipe is closed, because the exit code still carries the verdict."""
        if self._progress is not None:
            self._progress.stop()
        try:
            write()
        except BrokenPipeError:
            self.unread = True
        self.unread |= not flush(self._stdout)


def _console(stdout: TextIO) -> Console:
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:  # rich's default ends the process with exit code 1
            raise BrokenPipeError

    return Plain(file=stdout, width=None if stdout.isatty() else 160)  # wide enough that a pipe gets whole tables


@contextmanager
def run_session(as_json: bool, quiet: bool) -> Iterator[Session]:
    """Run a command with progress on stderr; turn every error into one line and an exit code."""
    session: Session | None = None
    signals = installed()
    if signals is not None:
        signals.begin()
    try:
        with _reserved_stdout() as stdout, _progress(quiet or as_json) as progress:
            session = Session(stdout, progress, as_json, quiet)
            yield session
        if session.unread:
            raise typer.Exit(BROKEN_PIPE)
        return
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError as error:
        raise typer.Exit(BROKEN_PIPE) from error
    except BaseException as error:
        failure = failure_of(error)
    failure = replace(failure, remedy=_whole_command(failure.remedy))
    raise typer.Exit(report_failure(failure, PROGRAM, as_json and not (session is not None and session.shown)))


def _progress(silent: bool) -> AbstractContextManager[Status | LogLines | None]:
    """Progress on stderr: one line that is rewritten on a terminal, else a line every ten seconds."""
    from rich.console import Console

    if silent:
        return nullcontext()
    errors = Console(stderr=True)
    return errors.status("starting") if errors.is_terminal else LogLines()


@contextmanager
def _reserved_stdout() -> Iterator[TextIO]:
    """Reserve stdout for the result; redirect output of the user's code and its child processes to stderr."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        try:
            descriptor, instead = stdout.fileno(), sys.stderr.fileno()
        except (AttributeError, OSError, ValueError):  # stdout is closed, or no file (in tests)
            yield stdout
            return
        kept = os.dup(descriptor)
        os.dup2(instead, descriptor)
        try:
            with os.fdopen(os.dup(kept), "w", encoding=stdout.encoding, errors=stdout.errors) as file:
                yield file
        finally:
            stdout.flush()  # output that came through sys.__stdout__
            os.dup2(kept, descriptor)
            os.close(kept)


def _whole_command(remedy: str) -> str:
    """Complete ``: MODEL --input SHAPE`` at the end of a remedy to the whole command line."""
    hint = re.search(r": .+ --input (\S+)$", remedy)
    arguments = sys.argv[1:]
    given = [i for i, argument in enumerate(arguments) if argument.split("=")[0] == "--input"]
    if hint is None or len(given) > 1:
        return remedy
    for i in given:
        del arguments[i : i + (1 if "=" in arguments[i] else 2)]
    return f"{remedy[: hint.start()]}: {shlex.join([PROGRAM, *arguments, '--input', hint[1]])}"
