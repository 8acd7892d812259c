"""The command line: what is parsed, and the exit code. No logic lives here; the commands import torch when they run."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from scconv_deploy.commands.artifacts import convert, quantize, rewrite, sensitivity, verify
from scconv_deploy.commands.engines import bench, build, finish, refit
from scconv_deploy.commands.machine import doctor
from scconv_deploy.commands.models import deploy, export, inspect, models
from scconv_deploy.commands.plugin import plugin
from scconv_deploy.commands.report import reports
from scconv_deploy.commands.run import run
from scconv_deploy.commands.session import PROGRAM
from scconv_deploy.errors import UsageError
from scconv_deploy.system.arguments import EMPTY_REMEDY, empty_argument
from scconv_deploy.system.failures import Failure, report_failure
from scconv_deploy.system.signals import BROKEN_PIPE, Signals, interrupted
from scconv_deploy.version import __version__

_UsageError: Any = typer.BadParameter.__bases__[0]  # typer's own, which it does not export


class _Group(typer.core.TyperGroup):
    """Reports a command line that cannot be parsed like every other error: one line, or one JSON document."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        failure, as_json = None, "--json" in args
        try:
            _check_shell(args)
            code = super().main(args, *rest, **options | {"standalone_mode": False})
        except _UsageError as error:
            see = f"See {error.ctx.command_path if error.ctx else PROGRAM} --help."
            failure = Failure(2, error.format_message(), see)
        except UsageError as error:
            failure = Failure(error.exit_code, error.message, error.remedy)
        except typer.Abort:
            failure = Failure(*interrupted())
        except OSError as error:  # of --help; commands report theirs
            failure, as_json = Failure(2, f"stdout cannot be written: {error.strerror}.", "Print elsewhere."), False
        except (
            SystemExit
        ) as left:  # 1: Typer and rich, when nobody reads --help; else completion. Commands return theirs
            code = BROKEN_PIPE if left.code == 1 else left.code
        if failure is not None:
            code = report_failure(failure, PROGRAM, as_json)
        sys.exit(code or 0)


def _check_shell(arguments: Sequence[str]) -> None:
    """Refuse what no command can work with."""
    if wrong := empty_argument(arguments):
        raise UsageError(wrong, EMPTY_REMEDY)
    try:
        os.getcwd()
    except OSError as error:  # libraries fail on it in their own ways
        raise UsageError(f"The current folder cannot be read: {error.strerror}.", "Go to another one.") from error


app = typer.Typer(
    name=PROGRAM,
    cls=_Group,
    pretty_exceptions_enable=False,
    help="Take PyTorch models with ScConv in them to ONNX, and prove that the artifact computes what PyTorch computes.",
    epilog="Exit codes: 0 done, 1 internal, 2 usage, 3 environment, 4 model or graph, 5 build, 6 parity failed, "
    "7 a file that is not what it claims, 130 interrupted, 143 ended by SIGTERM, 141 nobody reads the output.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """The options that need no command."""


for command in (
    deploy, export, rewrite, convert, quantize, sensitivity, verify, inspect, doctor, models, build, refit, bench,
    finish, run,
):  # fmt: skip
    app.command()(command)
app.add_typer(plugin, name="plugin")
app.add_typer(reports, name="report")


def main() -> NoReturn:
    """Run the command line; :mod:`scconv_deploy.__main__` comes here when it has taken care of the signals."""
    signals = Signals.install(app.info.name or "")
    try:
        app()
    except SystemExit as left:
        signals.leave(left.code if isinstance(left.code, int) else 1)
    signals.leave(0)
