"""Lines on stdout and stderr, and the JSON document of an error. Standard library only."""

from __future__ import annotations

import json
import sys

from scconv_deploy.bundle.contents import FINISH
from scconv_deploy.system.streams import flush


def show(text: str) -> bool:
    """On stdout; False if nobody reads it."""
    try:
        print(text)  # noqa: T201
    except BrokenPipeError:
        flush(sys.stdout)
        return False
    return flush(sys.stdout)


def fail(code: int, message: str, remedy: str, as_json: bool) -> int:
    """One line on stderr, and the JSON document if that is wanted; the exit code."""
    if as_json:
        show(json.dumps({"error": {"exit_code": code, "message": message, "remedy": remedy}}, indent=2))
    sys.stderr.write(f"{FINISH}: {message} {remedy}".rstrip() + "\n")
    return code
