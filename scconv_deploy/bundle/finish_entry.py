"""Where ``finish.pyz`` starts: what must be there before the rest can be imported. Standard library only."""

from __future__ import annotations

import json
import sys
from typing import NoReturn

from scconv_deploy.bundle.contents import FINISH
from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.process import Signals, flush, open_standard_streams


def main() -> NoReturn:
    """Handle signals before what takes a while to import, look for NumPy, and go on with :mod:`.finish_cli`."""
    signals = Signals.install(FINISH)
    open_standard_streams()
    try:
        require_numpy()
    except MissingRuntimeError as error:
        signals.leave(fail(error.exit_code, error.message, error.remedy, "--json" in sys.argv))
    from scconv_deploy.bundle import finish_cli

    finish_cli.main()


def require_numpy() -> None:
    """Refuse a Python without NumPy, or with one that does not load in it (MissingRuntimeError)."""
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        reason = f"is not installed for {sys.executable}"
        if not isinstance(error, ModuleNotFoundError) or error.name != "numpy":
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"does not load: {lines[-1] if lines else type(error).__name__}"  # NumPy says the cause last
        raise MissingRuntimeError(
            f"NumPy {reason.rstrip('.')}.", f"sudo apt install python3-numpy, or {sys.executable} -m pip install numpy."
        ) from error


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
