"""Options of quantisation that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scconv_deploy.commands.options import CheckOptions, GraphOptions
from scconv_deploy.errors import UsageError

if TYPE_CHECKING:
    from scconv_deploy.precision.placement import PlacementOptions
    from scconv_deploy.records.quantization import Target
    from scconv_deploy.verification.options import Checks
    from scconv_deploy.workflows.budget import Budget
    from scconv_deploy.workflows.calibrate import CalibrationOptions
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
CodesTarget = Annotated[
    Literal["gpu", "cpu"], typer.Option(help="Of the codes: signed for GPUs, unsigned for ONNX Runtime's CPU.")
]
ReduceRange = Annotated[
    bool, typer.Option("--reduce-range", help="Weights of 7 bits, which no CPU's int8 sums saturate.")
]
MaxDrop = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE", help="Budget: largest loss of accuracy on --data, as 0.5% or 0.005.", rich_help_panel=_PANEL
    ),
]
BudgetText = Annotated[
    str | None,
    typer.Option(
        "--budget", metavar="SHARE|DB",
        help="Leave in float what it takes: 0.5% is the largest loss of accuracy on --data (without labels, of changed "
        "answers), 40dB the lowest SNR. --budget searches, --max-drop judges.",
        rich_help_panel=_PANEL,
    ),
]  # fmt: skip
CalibrationCache = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Ranges that were observed: read if they fit, else written.",
                 rich_help_panel=_PANEL),
]  # fmt: skip


@dataclass(frozen=True)
class SiteOptions:
    """Options that calibrate, and choose what is quantised."""

    calibration: Calibration = "max"
    samples: CalibrationSamples = SAMPLES
    only: Only = None
    calibration_cache: CalibrationCache = None

    def calibrating(
        self, data: str | None, preprocessing: str | None, seed: int, source: str = ""
    ) -> CalibrationOptions:
        """Options of calibration (UsageError if one is invalid, or there are no data).

        Args:
            source: name of a zoo model, for its preprocessing of images.
        """
        from scconv_deploy.precision.calibration import Method
        from scconv_deploy.workflows.calibrate import RANDOM, CalibrationOptions, affine_of, parse_affine

        if data is None:
            raise UsageError(
                "There are no data to calibrate on, and scales made of noise are wrong for data.",
                f"Add --data SOURCE; --data {RANDOM} takes noise nevertheless.",
            )
        affine = affine_of(source) if preprocessing is None else parse_affine(preprocessing)
        return CalibrationOptions(
            data, self.samples, Method.parse(self.calibration), affine, self.calibration_cache, seed
        )

    def placement(self, keep: Sequence[str] | None) -> PlacementOptions:
        """Choice of what is quantised."""
        from scconv_deploy.precision.placement import PlacementOptions

        return PlacementOptions(tuple(keep or ()), tuple(self.only or ()))


@dataclass(frozen=True)
class Int8Options(SiteOptions):
    """Options of quantisation to int8."""

    max_drop: MaxDrop = None
    budget: BudgetText = None

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
        from scconv_deploy.workflows.quantize import QuantizeOptions

        calibrating = self.calibrating(data, preprocessing, seed, source)
        return QuantizeOptions(calibrating, self.placement(keep), target, self._budget(data), reduce_range)

    def _budget(self, data: str | None) -> Budget | None:
        from scconv_deploy.workflows.budget import Budget
        from scconv_deploy.workflows.calibrate import RANDOM

        if self.budget is None:
            return None
        found = Budget.parse(self.budget)
        if found.kind == "share" and self.max_drop is not None:
            raise UsageError(
                f"--budget {self.budget} judges the file too, so --max-drop {self.max_drop} repeats or contradicts it.",
                "Leave --max-drop out, or give --budget in decibels.",
            )
        if found.kind == "share" and data == RANDOM:
            raise UsageError(
                f"--budget {self.budget} is about answers, and answers on noise say nothing.",
                "Give real --data, or --budget in decibels.",
            )
        return found

    def checks(self, judged: CheckOptions) -> Checks:
        """Options of verification with the budget, and without data that are noise (UsageError if one is invalid)."""
        from scconv_deploy.verification.options import DEEP_INT8
        from scconv_deploy.workflows.calibrate import RANDOM

        if judged.data == RANDOM:
            if judged.preprocessing is not None:
                raise UsageError("--preprocessing is for images, and --data random gives noise.", "Leave it out.")
            judged = replace(judged, data=None, deep=None)
        elif judged.data is not None and judged.deep is None:
            judged = replace(judged, deep=DEEP_INT8)
        checks = judged.checks()
        budget = self._budget(judged.data)
        if self.max_drop is not None:
            limit = parse_share(self.max_drop)
        elif budget is not None and budget.kind == "share":
            if "max_drop" in checks.tolerances:
                raise UsageError(
                    f"--budget {self.budget} judges the file too, so --tolerance max_drop repeats or contradicts it.",
                    "Leave --tolerance max_drop out.",
                )
            limit = budget.limit
        else:
            return checks
        return replace(checks, tolerances={**checks.tolerances, "max_drop": limit})


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
