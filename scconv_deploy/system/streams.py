"""Standard streams: flushed without a traceback, and open from the start. Standard library only."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def flush(stream: Any) -> bool:
    """Flush a stream; False if nobody reads it any more, and further output is discarded."""
    try:
        if stream is not None:
            stream.flush()
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return False
    except (OSError, ValueError):  # full, or closed: said where it was written
        pass
    return True


def open_standard_streams() -> None:
    """Open closed standard streams on the null device: else the next file would get their number, and their output."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # a name that the terminal's encoding lacks is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
