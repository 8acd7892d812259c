"""Options of quantisation that several commands share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scconv_deploy.commands.options import CheckOptions
from scconv_deploy.errors import UsageError

if TYPE_CHECKING:
    from scconv_deploy.verification.options import Checks
    from scconv_deploy.workflows.calibrate import CalibrationOptions

_PANEL = "int8"
Calibration = Annotated[
    str,
    typer.Option(
        metavar="max|entropy|percentile[:P]", help="How an activation's range follows from --data.",
        rich_help_panel=_PANEL,
    ),
]  # fmt: skip
CalibrationSamples = Annotated[
    int, typer.Option("--samples", min=1, help="Most rows of --data to calibrate on.", rich_help_panel=_PANEL)
]
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Layers that are quantised, with * and ?, first and last ones too; repeatable.",
        rich_help_panel=_PANEL,
    ),
]  # fmt: skip
MaxDrop = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE", help="Budget: largest loss of accuracy on --data, as 0.5% or 0.005.", rich_help_panel=_PANEL
    ),
]
CalibrationCache = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Ranges that were observed: read if they fit, else written.",
                 rich_help_panel=_PANEL),
]  # fmt: skip


def calibration_options(
    method: str, samples: int, cache: Path | None, judged: CheckOptions, seed: int
) -> CalibrationOptions:
    """Options of calibration (UsageError if one is invalid, or there are no data)."""
    from scconv_deploy.precision.calibration import Method
    from scconv_deploy.workflows.calibrate import RANDOM, CalibrationOptions, parse_affine

    if judged.data is None:
        raise UsageError(
            "There are no data to calibrate on, and scales made of noise are wrong for data.",
            f"Add --data SOURCE; --data {RANDOM} takes noise nevertheless.",
        )
    affine = None if judged.preprocessing is None else parse_affine(judged.preprocessing)
    return CalibrationOptions(judged.data, samples, Method.parse(method), affine, cache, seed)


def judged_with_budget(judged: CheckOptions, max_drop: str | None) -> Checks:
    """Options of verification with a budget, and without data that are noise (UsageError if one is invalid)."""
    from scconv_deploy.workflows.calibrate import RANDOM

    if judged.data == RANDOM:
        if judged.preprocessing is not None:
            raise UsageError("--preprocessing is for images, and --data random gives noise.", "Leave it out.")
        judged = replace(judged, data=None, deep=None)
    checks = judged.checks()
    if max_drop is None:
        return checks
    return replace(checks, tolerances={**checks.tolerances, "max_drop": parse_share(max_drop)})


def parse_share(text: str) -> float:
    """Read ``0.5%`` or ``0.005`` (UsageError otherwise)."""
    number, percent = text.removesuffix("%"), text.endswith("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(f"--max-drop {text!r} is no share.", "Write 0.5% or 0.005.")
    return share
