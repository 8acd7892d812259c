"""The process itself: the signals that end it, its standard streams, and how it leaves. Standard library only.

This is imported before anything else, for whatever takes a while to import can be interrupted. What it imports is
little on purpose: until :meth:`Signals.install` Ctrl-C prints Python's own traceback.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from scconv_deploy.system.streams import flush

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

BROKEN_PIPE = 128 + 13
"""Exit code that shells give a process ended by SIGPIPE, as other tools leave ``| head``; ``pipefail`` knows it."""
NOTHING_LEFT = "No half-written file is left."
_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
DUPLICATE_SIGNAL_S = 0.5  # one Ctrl-C comes twice where uv run or docker --init forwards what the terminal sends too


class Signals:
    """Handler of the signals that end a process: SIGINT, SIGTERM and SIGHUP, unless they were ignored already.

    Until a command has begun the process leaves at once, for there is nothing to be undone; then KeyboardInterrupt is
    raised, so that children and temporary files go; once the exit code is decided it stays what it is.

    Attributes:
        number: the first signal since the command began; None without one. It stays, whoever swallows the exception.
        program: its name in the line.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        self.number: int | None = None
        self._begun = False
        self._decided: int | None = None
        self._last_s = 0.0
        self._held = 0
        self._waiting = False  # a signal came while they were held

    @classmethod
    def install(cls, program: str) -> Signals:
        """Handle the signals from here on; an installed handler is kept."""
        found = installed()
        if found is not None:
            return found
        handler = cls(program)
        for name in _NAMES:
            number = getattr(signal, name, None)  # Windows has no SIGHUP
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # nohup, and & in scripts
                signal.signal(number, handler)
        sys.unraisablehook = handler.unraisable
        return handler

    def __call__(self, number: int, frame: object) -> None:
        if self._decided is not None:
            os._exit(self._decided)
        if not self._begun:
            self.number = number
            os._exit(self._report())
        now = time.monotonic()
        if self.number is not None and now - self._last_s < DUPLICATE_SIGNAL_S:
            return
        self.number, self._last_s = self.number or number, now
        self._waiting = bool(self._held)
        if not self._held:
            raise KeyboardInterrupt

    def begin(self) -> None:
        """Note that from here on there may be something to undo."""
        self._begun = True

    def check(self) -> None:
        """Raise an interrupt again that a library swallowed, by a bare except or in C code."""
        from threading import current_thread, main_thread

        if self.number is not None and not self._held and current_thread() is main_thread():
            raise KeyboardInterrupt

    def __enter__(self) -> None:
        """Hold the signals back for a step that must not be torn apart."""
        self._held += 1

    def __exit__(self, *failure: object) -> None:
        self._held -= 1
        if self._waiting and not self._held:
            self._waiting = False
            raise KeyboardInterrupt

    @property
    def failure(self) -> tuple[int, str, str]:
        """Exit code (130, or 143 after SIGTERM), message and remedy."""
        number = self.number or signal.SIGINT
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        return 128 + number, f"Interrupted{by}.", NOTHING_LEFT

    def _report(self) -> int:
        """Print the interrupt by system calls alone: a handler may run in the middle of a write to that stream."""
        code, message, remedy = self.failure
        if "--json" in sys.argv:
            _write(1, f'{{\n  "error": {{\n    "exit_code": {code},\n    "message": "{message}",\n'
                      f'    "remedy": "{remedy}"\n  }}\n}}\n')  # fmt: skip
        _write(2, f"{self.program}: {message} {remedy}\n")
        return code

    def unraisable(self, found: Any) -> None:
        """Raise an interrupt again that a destructor or callback lost."""
        if isinstance(found.exc_value, KeyboardInterrupt) and self.number is not None and self._decided is None:
            from threading import Thread

            self._last_s = 0.0
            Thread(target=_send_soon, args=(self.number,), daemon=True).start()  # here it would be lost as well
        else:
            sys.__unraisablehook__(found)

    def leave(self, code: int) -> NoReturn:
        """End the process with this exit code, whatever signals or closed streams do meanwhile."""
        self._decided = code
        for stream in (sys.stdout, sys.stderr):
            flush(stream)
        from threading import active_count

        if self.number is not None and active_count() > 1:
            os._exit(code)  # a library's thread that does not stop would be waited for
        sys.exit(code)


def installed() -> Signals | None:
    """The handler of this process; None in tests, and in programs that use the package."""
    numbers = (getattr(signal, name, None) for name in _NAMES)  # any of them may have been ignored already
    handlers = (signal.getsignal(number) for number in numbers if number is not None)
    return next((handler for handler in handlers if isinstance(handler, Signals)), None)


def held() -> Any:
    """A context in which signals wait for the end of a step, where :class:`Signals` are installed."""
    from contextlib import nullcontext

    return installed() or nullcontext()


def interrupted() -> tuple[int, str, str]:
    """Exit code, message and remedy of a KeyboardInterrupt."""
    return (installed() or Signals("")).failure


def _send_soon(number: int) -> None:
    time.sleep(0.05)
    os.kill(os.getpid(), number)


def _write(descriptor: int, text: str) -> None:
    from contextlib import suppress

    with suppress(OSError):
        os.write(descriptor, text.encode())
