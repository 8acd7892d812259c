"""How a command runs: results to stdout, progress to stderr, and every error as one line with its exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any, TextIO

import typer

from scconv_deploy.errors import ScconvDeployError

if TYPE_CHECKING:
    from rich.status import Status


def command_line() -> str:
    """The command that runs, as it could be pasted."""
    return shlex.join(["scconv-deploy", *sys.argv[1:]])


class Session:
    """Where the output of one command goes: results to stdout, progress to stderr."""

    def __init__(self, stdout: TextIO, status: Status | None, as_json: bool, quiet: bool) -> None:
        self._stdout = stdout
        self._status = status
        self._json = as_json
        self._quiet = quiet
        self.shown = False

    def progress(self, message: str) -> None:
        """Say what is being done, on a terminal."""
        from rich.text import Text

        if self._status is not None:
            self._status.update(Text(message))

    def show(self, result: Any, printer: str) -> None:
        """Print a result as JSON, or with a function of :mod:`scconv_deploy.report.text`."""
        from rich.console import Console

        from scconv_deploy.report import text

        if self._status is not None:
            self._status.stop()
        if self._json:
            typer.echo(json.dumps(result.as_json(), indent=2), file=self._stdout)
        elif not self._quiet:
            # a pipe gets tables as wide as they are
            console = Console(file=self._stdout, width=None if self._stdout.isatty() else 160)
            getattr(text, printer)(console, result)
        self.shown = True

    def write(self, document: str) -> None:
        """Print a document as it is."""
        if self._status is not None:
            self._status.stop()
        typer.echo(document, file=self._stdout, nl=False)
        self.shown = True


@contextmanager
def run_session(as_json: bool, quiet: bool) -> Iterator[Session]:
    """Run a command: progress on stderr while it lasts, and every error as its line and its exit code."""
    session: Session | None = None
    try:
        from rich.console import Console

        errors = Console(stderr=True)
        wanted = errors.is_terminal and not quiet and not as_json
        with _reserved_stdout() as stdout, errors.status("starting") if wanted else nullcontext() as status:
            session = Session(stdout, status, as_json, quiet)
            yield session
        return
    except ScconvDeployError as error:
        if error.details:
            typer.echo(error.details, err=True)
        failure = error.exit_code, error.message, _whole_command(error.remedy)
    except KeyboardInterrupt:
        failure = 130, "Interrupted.", "No half-written file is left."
    except SystemExit as error:  # the user's forward
        failure = 4, f"The model called sys.exit({error.code!r}).", "Correct its code."
    except PermissionError as error:
        failure = 2, f"{error.filename} cannot be read: {error.strerror}.", "Check its permissions."
    except (BrokenPipeError, typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            failure = 2, "No space is left where the result goes.", "Free some, or write elsewhere."
        else:  # a bug: say so, with what its report needs
            traceback.print_exc()
            remedy = "This is a bug in scconv-deploy; please report it with the lines above and the command."
            failure = 1, f"Internal error: {type(error).__name__}: {error}", remedy
    raise typer.Exit(report_error(*failure, as_json=as_json and not (session is not None and session.shown)))


@contextmanager
def _reserved_stdout() -> Iterator[TextIO]:
    """Keep stdout for the result: what the user's code and its child processes print there goes to stderr."""
    stdout = sys.stdout
    with redirect_stdout(sys.stderr):
        try:
            descriptor, instead = stdout.fileno(), sys.stderr.fileno()
        except (AttributeError, OSError, ValueError):  # closed, or no file as in a test
            yield stdout
            return
        kept = os.dup(descriptor)
        os.dup2(instead, descriptor)
        try:
            with os.fdopen(os.dup(kept), "w", encoding=stdout.encoding) as file:
                yield file
        finally:
            stdout.flush()  # what came through sys.__stdout__
            os.dup2(kept, descriptor)
            os.close(kept)


def _whole_command(remedy: str) -> str:
    """A remedy that ends in ``: MODEL --input SHAPE`` with the whole command there, so that it can be pasted."""
    hint = re.search(r": .+ --input (\S+)$", remedy)
    arguments = sys.argv[1:]
    given = [i for i, argument in enumerate(arguments) if argument.split("=")[0] == "--input"]
    if hint is None or len(given) > 1:
        return remedy
    for i in given:
        del arguments[i : i + (1 if "=" in arguments[i] else 2)]
    return f"{remedy[: hint.start()]}: {shlex.join(['scconv-deploy', *arguments, '--input', hint[1]])}"


def report_error(code: int, message: str, remedy: str, *, as_json: bool) -> int:
    """Print an error: one line on stderr, and the JSON document if that is wanted."""
    message, remedy = (" ".join(map(str.strip, text.splitlines())) for text in (message, remedy))
    if message[-1:] not in ".!?":
        message += "."
    if as_json:
        with suppress(OSError):  # stdout may be what failed; the line on stderr says it still
            typer.echo(json.dumps({"error": {"exit_code": code, "message": message, "remedy": remedy}}, indent=2))
    typer.echo(f"scconv-deploy: {message} {remedy}".rstrip(), err=True)
    return code
