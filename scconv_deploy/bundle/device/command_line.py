"""The command line of ``finish.pyz``; ``scconv-deploy finish`` takes the same options. Standard library only."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from scconv_deploy.bundle.contents import FINISH, MANIFEST
from scconv_deploy.bundle.device.finish import FinishOptions, FinishResult, finish_bundle
from scconv_deploy.errors import ParityError, UsageError
from scconv_deploy.system.arguments import EMPTY_REMEDY, empty_argument
from scconv_deploy.system.failures import Failure, failure_of, report_failure
from scconv_deploy.system.progress_lines import LogLines
from scconv_deploy.system.signals import BROKEN_PIPE, Signals, installed
from scconv_deploy.system.streams import flush, open_standard_streams
from scconv_deploy.version import __version__


def main(arguments: list[str] | None = None) -> NoReturn:
    """Parse the arguments, finish the bundle, print the result, and exit with its code."""
    signals = Signals.install(FINISH)
    open_standard_streams()
    signals.leave(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Parse the arguments, finish the bundle, print the result. Returns the exit code."""
    if wrong := empty_argument(arguments):
        return report_failure(Failure(UsageError.exit_code, wrong, EMPTY_REMEDY), FINISH, "--json" in arguments)
    try:
        options = _parser().parse_args(arguments)
    except UsageError as error:
        return report_failure(failure_of(error), FINISH, "--json" in arguments)
    command = shlex.join(["python3", FINISH, *arguments])
    signals = installed()
    if signals is not None:
        signals.begin()
    try:
        wanted = FinishOptions(
            plugin=not options.no_plugin,
            tensorrt_include=options.tensorrt_include,
            digest=options.digest,
            rounds=options.rounds,
            warmup=options.warmup,
            force=options.force,
        )
        with _progress(options) as progress:
            result = finish_bundle(options.bundle, wanted, command=command, progress=progress)
        unread = not options.quiet and not _show(
            json.dumps(result.as_json(), indent=2) if options.json else "\n".join(result.lines)
        )
        if not result:
            return _failed(result)
        return BROKEN_PIPE if unread else 0
    except BaseException as error:
        return report_failure(failure_of(error), FINISH, options.json)


def _show(text: str) -> bool:
    """Print on stdout. Returns False if its reader has closed it."""
    try:
        sys.stdout.write(f"{text}\n")
    except BrokenPipeError:
        flush(sys.stdout)
        return False
    return flush(sys.stdout)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        FINISH, description="Build the engine of a bundle on this device, compare it with PyTorch, and time it."
    )
    here = Path(sys.argv[0]).parent if sys.argv[0].endswith(FINISH) else Path()
    parser.add_argument(
        "bundle", nargs="?", type=Path, default=here, help="folder of the bundle; by default that of this file"
    )
    parser.add_argument("--digest", default="", help=f"SHA-256 of the bundle's {MANIFEST}, as deploy printed it")
    parser.add_argument("--no-plugin", action="store_true", help="build without the fused SRU")
    parser.add_argument("--tensorrt-include", type=Path, metavar="FOLDER", help="where NvInfer.h is")
    parser.add_argument("--rounds", type=_at_least(1), default=100, help="timed runs (100)")
    parser.add_argument("--warmup", type=_at_least(0), default=10, help="untimed runs before them (10)")
    parser.add_argument("--force", action="store_true", help="replace an earlier device/")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout and nothing else")
    parser.add_argument("--quiet", action="store_true", help="errors only")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {minimum}.")
        return value

    return number


class _Parser(argparse.ArgumentParser):
    """Argument parser whose errors are one line; argparse also prints the usage."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.rstrip('.')}.", f"See {FINISH} --help.")


@contextmanager
def _progress(options: argparse.Namespace) -> Iterator[Callable[[str], None]]:
    """Show progress on stderr: one rewritten line on a terminal, occasional lines elsewhere."""
    if options.json or options.quiet:
        yield lambda message: None
    elif not sys.stderr.isatty():
        with LogLines() as lines:
            yield lines
    else:
        yield lambda message: _rewrite(f"\r\x1b[K{message}")
        _rewrite("\r\x1b[K")


def _rewrite(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _failed(result: FinishResult) -> int:
    message = f"{result.report.artifact}: {result.report.failures[0]}"
    return report_failure(Failure(ParityError.exit_code, message, "Do not ship it."), FINISH, as_json=False)
