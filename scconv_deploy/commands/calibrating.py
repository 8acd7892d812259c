"""Options of quantisation that several commands share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scconv_deploy.commands.options import CheckOptions, GraphOptions
from scconv_deploy.errors import UsageError

if TYPE_CHECKING:
    from scconv_deploy.records.quantization import Target
    from scconv_deploy.verification.options import Checks
    from scconv_deploy.workflows.quantize import QuantizeOptions

SAMPLES = 256
"""Default number of rows to calibrate on."""
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


@dataclass(frozen=True)
class Int8Options:
    """Options of quantisation to int8."""

    calibration: Calibration = "max"
    samples: CalibrationSamples = SAMPLES
    only: Only = None
    max_drop: MaxDrop = None
    calibration_cache: CalibrationCache = None

    @property
    def given(self) -> tuple[str, ...]:
        """Options that were given, for a message."""
        usual = type(self)()
        return tuple(f"--{n.replace('_', '-')}" for n, value in vars(self).items() if value != getattr(usual, n))

    def quantization(
        self, graph: GraphOptions, data: str | None, preprocessing: str | None, seed: int, source: str = ""
    ) -> QuantizeOptions | None:
        """Options of quantisation; None if the precision is no int8 (UsageError if one is for nothing or invalid)."""
        if not graph.is_int8:
            if self.given:
                raise UsageError(f"{self.given[0]} is for int8.", "Add --precision int8, or leave it out.")
            return None
        return self.options(data, preprocessing, seed, tuple(graph.keep or ()), source=source)

    def options(
        self,
        data: str | None,
        preprocessing: str | None,
        seed: int,
        keep: tuple[str, ...],
        target: Target = "gpu",
        source: str = "",
        reduce_range: bool = False,
    ) -> QuantizeOptions:
        """Options of quantisation (UsageError if one is invalid, or there are no data).

        Args:
            source: name of a zoo model, for its preprocessing of images.
        """
        from scconv_deploy.precision.calibration import Method
        from scconv_deploy.precision.placement import PlacementOptions
        from scconv_deploy.workflows.calibrate import RANDOM, CalibrationOptions, affine_of, parse_affine
        from scconv_deploy.workflows.quantize import QuantizeOptions

        if data is None:
            raise UsageError(
                "There are no data to calibrate on, and scales made of noise are wrong for data.",
                f"Add --data SOURCE; --data {RANDOM} takes noise nevertheless.",
            )
        affine = affine_of(source) if preprocessing is None else parse_affine(preprocessing)
        calibrating = CalibrationOptions(
            data, self.samples, Method.parse(self.calibration), affine, self.calibration_cache, seed
        )
        return QuantizeOptions(calibrating, PlacementOptions(keep, tuple(self.only or ())), target, reduce_range)

    def checks(self, judged: CheckOptions) -> Checks:
        """Options of verification with the budget, and without data that are noise (UsageError if one is invalid)."""
        from scconv_deploy.workflows.calibrate import RANDOM

        if judged.data == RANDOM:
            if judged.preprocessing is not None:
                raise UsageError("--preprocessing is for images, and --data random gives noise.", "Leave it out.")
            judged = replace(judged, data=None, deep=None)
        checks = judged.checks()
        if self.max_drop is None:
            return checks
        return replace(checks, tolerances={**checks.tolerances, "max_drop": parse_share(self.max_drop)})


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
