"""A verdict as an error of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scconv_deploy.errors import ParityError

if TYPE_CHECKING:  # the command line starts without NumPy
    from scconv_deploy.records.parity import ParityReport

_NO_VERDICT = (
    "This is no verdict: nothing says that it is right, and nothing that it is wrong. Give --data, and judge it by its "
    "answers."
)


def parity_error(artifact: object, report: ParityReport, remedy: str) -> ParityError:
    """Of a report that is false; one without a verdict is told from one that failed.

    Args:
        artifact: what was judged, as it is to be called.
        remedy: where it failed.
    """
    if report.verdict == "failed":
        return ParityError(f"{artifact}: {report.failures[0]}", remedy)
    return ParityError(f"{artifact} was not judged: {report.failures[0]}.", _NO_VERDICT)
