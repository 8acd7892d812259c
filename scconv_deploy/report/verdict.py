"""ParityError of a report, for the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scconv_deploy.errors import ParityError

if TYPE_CHECKING:  # not at run time: the command line starts without NumPy
    from scconv_deploy.records.parity import ParityReport

_NO_VERDICT = (
    "This is no verdict: the artifact may be right or wrong. Give labelled --data, and judge it by its accuracy."
)
_WITHOUT_MODEL = (
    "This is no verdict: the file may be right or wrong. Name its model with --reference MODEL, or judge it by its "
    "accuracy on labelled --data."
)
_WITHOUT_PLACE = (
    "This is no verdict: the file may be right or wrong. Judge it by its accuracy on labelled --data, or make another "
    "of the float file with scconv-deploy quantize, whose quantisers have places in the model."
)
_NAME_IT = "--reference MODEL"
"""In the reason of a quantised file that was judged without its model."""


def parity_error(artifact: object, report: ParityReport, remedy: str) -> ParityError:
    """Make the error of a report that failed or has no verdict.

    Args:
        artifact: name of the artifact in the message.
        remedy: what to do if it failed.
    """
    if report.verdict == "failed":
        return ParityError(f"{artifact}: {report.failures[0]}", remedy)
    reasons = [check.reason for link in report.links for check in link.checks if check.name == "quantization"]
    remedy = _NO_VERDICT
    if reasons:
        remedy = _WITHOUT_MODEL if _NAME_IT in reasons[0] else _WITHOUT_PLACE
    return ParityError(f"{artifact} was not judged: {report.failures[0]}.", remedy)
