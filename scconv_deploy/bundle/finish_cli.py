"""The command line of ``finish.pyz``; ``scconv-deploy finish`` takes the same options. Standard library only."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from scconv_deploy import __version__
from scconv_deploy.bundle.contents import FINISH, MANIFEST
from scconv_deploy.bundle.finish import FinishOptions, FinishResult, finish_bundle
from scconv_deploy.errors import ParityError, ScconvDeployError


def main(arguments: list[str] | None = None) -> NoReturn:
    """Parse, finish, print, and exit with the codes of the command line."""
    signal.signal(signal.SIGTERM, _interrupt)  # so that temporary files are removed
    given = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(given)
    command = shlex.join(["python3", FINISH, *given])
    try:
        wanted = FinishOptions(
            plugin=not options.no_plugin,
            tensorrt_include=options.tensorrt_include,
            digest=options.digest,
            rounds=options.rounds,
            warmup=options.warmup,
            force=options.force,
        )
        result = finish_bundle(options.bundle, wanted, command=command, progress=_progress(options))
        if options.json:
            print(json.dumps(result.as_json(), indent=2))  # noqa: T201
        elif not options.quiet:
            print("\n".join(result.lines))  # noqa: T201
        sys.exit(_failed(result) if not result else 0)
    except ScconvDeployError as error:
        if error.details:
            sys.stderr.write(f"{error.details}\n")
        sys.exit(_error(error.exit_code, error.message, error.remedy, options.json))
    except KeyboardInterrupt:
        sys.exit(_error(130, "Interrupted.", "No half-written file is left.", options.json))
    except Exception as error:  # a bug: say so, with what its report needs
        traceback.print_exc()
        remedy = "This is a bug in scconv-deploy; please report it with the lines above."
        sys.exit(_error(1, f"Internal error: {type(error).__name__}: {error}", remedy, options.json))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        FINISH, description="Build the engine of a bundle on this device, compare it with PyTorch, and time it."
    )
    here = Path(sys.argv[0]).parent if sys.argv[0].endswith(FINISH) else Path()
    parser.add_argument(
        "bundle", nargs="?", type=Path, default=here, help="its folder; by default the one this lies in"
    )
    parser.add_argument("--digest", default="", help=f"of the bundle's {MANIFEST}, as deploy printed it")
    parser.add_argument("--no-plugin", action="store_true", help="build without the fused SRU")
    parser.add_argument("--tensorrt-include", type=Path, metavar="FOLDER", help="where NvInfer.h is")
    parser.add_argument("--rounds", type=_count, default=100, help="timed runs (100)")
    parser.add_argument("--warmup", type=int, default=10, help="runs before them (10)")
    parser.add_argument("--force", action="store_true", help="replace an earlier device/")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout and nothing else")
    parser.add_argument("--quiet", action="store_true", help="errors only")
    parser.add_argument("--version", action="version", version=__version__)
    return parser


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return int(text)


def _progress(options: argparse.Namespace):
    def tell(message: str) -> None:
        if sys.stderr.isatty() and not options.json and not options.quiet:
            sys.stderr.write(f"\r\x1b[K{message}")
            sys.stderr.flush()

    return tell


def _failed(result: FinishResult) -> int:
    message = f"{result.report.artifact}: {result.report.failures[0]}"
    return _error(ParityError.exit_code, message, "Do not ship it.", False)


def _error(code: int, message: str, remedy: str, as_json: bool) -> int:
    """One line on stderr, and the JSON document if that is wanted; the exit code."""
    if as_json:
        print(json.dumps({"error": {"exit_code": code, "message": message, "remedy": remedy}}, indent=2))  # noqa: T201
    sys.stderr.write(f"{FINISH}: {message} {remedy}".rstrip() + "\n")
    return code


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
