"""One family of errors; each carries the exit code of the command line and the remedy.

Library code raises, :mod:`scconv_deploy.commands.session` catches, prints ``message`` and ``remedy`` on one line and
exits with ``exit_code``. The codes are the contract of the command line: scripts and CI branch on them.
"""

from __future__ import annotations


class ScconvDeployError(Exception):
    """Base of the family.

    Args:
        message: names the object, what was expected and what was found, in one line.
        remedy: what the user can do about it, as a command where there is one; every error has one.

    Attributes:
        details: lines of another program that explain the message, for example a compiler's; shown before it.
    """

    exit_code = 1
    details = ""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".rstrip()


class UsageError(ScconvDeployError):
    """An option, a missing file or factory, an output that already exists."""

    exit_code = 2


class MissingRuntimeError(ScconvDeployError):
    """A runtime, a GPU, a plugin or an optional package is missing."""

    exit_code = 3


class ModelError(ScconvDeployError):
    """The model or graph cannot be loaded, exported, rewritten or converted."""

    exit_code = 4


class ConfigurationError(ModelError, ValueError):
    """A module was asked for sizes that it cannot have."""


class RefusedSizesError(ModelError, RuntimeError):
    """The model raised torch's RuntimeError on inputs of other sizes than the example's."""


class BuildError(ScconvDeployError):
    """An engine or a plugin could not be built; details are the compiler's lines."""

    exit_code = 5

    def __init__(self, message: str, remedy: str, details: str = "") -> None:
        super().__init__(message, remedy)
        self.details = details


class ParityError(ScconvDeployError):
    """The artifact does not compute what PyTorch computes."""

    exit_code = 6


class IntegrityError(ScconvDeployError):
    """A file is not what it claims to be (truncated, not ONNX, hash mismatch)."""

    exit_code = 7


class UntrustedError(IntegrityError):
    """Reading the file would execute code that the user has not said to trust."""


def first_line(error: BaseException, otherwise: str = "no message") -> str:
    """The first line of an error's message, or ``otherwise`` where it has none."""
    return (str(error).strip() or otherwise).splitlines()[0].rstrip()
