"""Entry point of ``finish.pyz``: signals and the check for NumPy, before other imports. Standard library only."""

from __future__ import annotations

import sys
from typing import NoReturn

from scconv_deploy.bundle.contents import FINISH
from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.system.failures import failure_of, report_failure
from scconv_deploy.system.signals import Signals
from scconv_deploy.system.streams import open_standard_streams


def main() -> NoReturn:
    """Install signal handlers, require NumPy, then import and run :mod:`.command_line`."""
    signals = Signals.install(FINISH)
    open_standard_streams()
    try:
        require_numpy()
    except MissingRuntimeError as error:
        signals.leave(report_failure(failure_of(error), FINISH, "--json" in sys.argv))
    from scconv_deploy.bundle.device import command_line

    command_line.main()


def require_numpy() -> None:
    """Refuse a Python in which NumPy is missing or does not load (MissingRuntimeError)."""
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
