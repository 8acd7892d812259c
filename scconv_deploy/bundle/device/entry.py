"""Where ``finish.pyz`` starts: what must be there before the rest can be imported. Standard library only."""

from __future__ import annotations

import sys
from typing import NoReturn

from scconv_deploy.bundle.contents import FINISH
from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.system.failures import failure_of, report_failure
from scconv_deploy.system.signals import Signals
from scconv_deploy.system.streams import open_standard_streams


def main() -> NoReturn:
    """Handle signals before what takes a while to import, look for NumPy, and go on with :mod:`.command_line`."""
    signals = Signals.install(FINISH)
    open_standard_streams()
    try:
        require_numpy()
    except MissingRuntimeError as error:
        signals.leave(report_failure(failure_of(error), FINISH, "--json" in sys.argv))
    from scconv_deploy.bundle.device import command_line

    command_line.main()


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
