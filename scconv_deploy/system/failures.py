"""How a failed command ends: exit code, one line on stderr, JSON document. Standard library only."""

from __future__ import annotations

import errno
import json
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass

from scconv_deploy.errors import ModelError, ScconvDeployError, UsageError
from scconv_deploy.system.signals import installed, interrupted
from scconv_deploy.system.streams import flush


@dataclass(frozen=True)
class Failure:
    """Message, remedy and exit code of an error.

    Attributes:
        details: lines shown before the message: a compiler's, or the traceback of a bug.
    """

    exit_code: int
    message: str
    remedy: str
    details: str = ""


def failure_of(error: BaseException) -> Failure:
    """Exit code, message and remedy of whatever ended a command; what no code expected is a bug."""
    signals = installed()
    if isinstance(error, KeyboardInterrupt) or (signals is not None and signals.number is not None):
        return Failure(*interrupted())  # whatever became of KeyboardInterrupt on its way
    if isinstance(error, ScconvDeployError):
        return Failure(error.exit_code, error.message, error.remedy, error.details)
    if isinstance(error, SystemExit):  # the user's forward
        return Failure(ModelError.exit_code, f"The model called sys.exit({error.code!r}).", "Correct its code.")
    if isinstance(error, PermissionError):
        message = f"{error.filename} cannot be read: {error.strerror}."
        return Failure(UsageError.exit_code, message, "Check its permissions.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        message, remedy = "No space is left where the result goes.", "Free some, or write elsewhere."
        return Failure(UsageError.exit_code, message, remedy)
    return Failure(
        1,
        f"Internal error: {type(error).__name__}: {error}",
        "This is a bug in scconv-deploy; please report it with the lines above and the command.",
        "".join(traceback.format_exception(error)).rstrip(),
    )


def report_failure(failure: Failure, program: str, as_json: bool) -> int:
    """Print a failure: details and one line on stderr, the JSON document on stdout if that is wanted.

    Args:
        program: what the line starts with.

    Returns:
        the exit code.
    """
    message, remedy = (" ".join(map(str.strip, text.splitlines())) for text in (failure.message, failure.remedy))
    if message[-1:] not in ".!?":
        message += "."
    with suppress(OSError):
        if failure.details:
            sys.stderr.write(f"{failure.details}\n")
    if as_json:
        error = {"exit_code": failure.exit_code, "message": message, "remedy": remedy}
        with suppress(OSError):  # stdout may be what failed; the line on stderr says it still
            sys.stdout.write(json.dumps({"error": error}, indent=2) + "\n")
        flush(sys.stdout)
    with suppress(OSError):
        sys.stderr.write(f"{program}: {message} {remedy}".rstrip() + "\n")
    return failure.exit_code
