"""Limits of errors: tolerances in multiples of the reference's noise. No onnx: it also runs on the device."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from scconv_deploy.records import tolerances
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.records.tolerances import Table
from scconv_deploy.verification.metrics import distance
from scconv_deploy.verification.reference.run import ReferenceRun, RoundedRun

FLOAT32 = np.dtype(np.float32)


@dataclass(frozen=True)
class AgainstNoise:
    """Distance of an output from the reference, and the noise floor, see :func:`.metrics.distance`.

    Attributes:
        floor_name, largest_floor: name and value of the tolerance that limits the noise.
        measured: whether the noise was measured; else it is assumed.
    """

    error: float
    floor: float
    floor_name: str
    largest_floor: float
    measured: bool = True

    @property
    def ratio(self) -> float:
        return self.error / self.floor

    @property
    def sortable_ratio(self) -> float:
        """The ratio, infinite if it is no number."""
        return math.inf if math.isnan(self.ratio) else self.ratio

    @property
    def multiple(self) -> str:
        """Name of the tolerance that limits the ratio."""
        return "half_multiple" if self.floor_name.endswith(("float16", "bfloat16")) else "replay_multiple"

    @property
    def badness(self) -> tuple[bool, float]:
        """Sort key, larger is worse; a noise floor above its limit proves nothing and is worse than any ratio."""
        return not self.floor <= self.largest_floor, self.sortable_ratio


@dataclass
class Ruler:
    """Tolerances of one artifact, and facts about the reference's noise over the samples.

    Attributes:
        limits: table of tolerances; it also bounds noise floors.
        data: type of the artifact's data; its rounding is the smallest noise floor.
        spread: factor by which equally right runs of the reference scatter, the largest over the samples.
        half_spread: the same factor for the rounded reference.
        continuous: whether the reference was continuous on every sample with large noise; None if there is none.
        float64_refusal: why the noise was measured without float64; "" if it was not.
    """

    limits: Table
    data: np.dtype = FLOAT32
    spread: float = 1.0
    half_spread: float = 1.0
    continuous: bool | None = None
    float64_refusal: str = ""
    _compared: set[tuple[str, str]] = field(default_factory=set)

    def add(self, run: ReferenceRun) -> None:
        """Add the noise facts of one sample; call it before the sample is compared."""
        self.float64_refusal = run.float64_refusal
        self.spread = max(self.spread, run.spread)
        usual = self.limits["largest_floor.float32"].value
        floors = [*run.floors.values(), *(site.floor for site in run.sites.values())]
        if any(floor is not None and not floor <= usual for floor in floors):
            self.continuous = run.continuous and self.continuous is not False

    def add_rounded(self, run: RoundedRun) -> None:
        """Add the noise facts of the rounded reference on one sample."""
        self.half_spread = max(self.half_spread, run.spread)

    def count(self, check: str, value: str) -> None:
        """Count a value that a check compares with its noise: the largest of more values may be larger."""
        self._compared.add((check, value))

    def largest_multiple(self, name: str) -> float:
        """Limit of the worst of all values compared, in multiples of its noise.

        The largest of n draws whose logarithms have the deviation ln(spread) is about spread^sqrt(2 ln n).

        Args:
            name: name of the tolerance for one value, ``replay_multiple`` or ``half_multiple``.
        """
        tolerance = self.limits[name]
        if tolerance.given:
            return tolerance.value
        smallest, largest = (tolerances.FIXED[f"{name}_spread"].value for name in ("smallest", "largest"))
        spread = min(max(self.half_spread if name == "half_multiple" else self.spread, smallest), largest)
        return float(tolerance.value * spread ** math.sqrt(2 * math.log(max(len(self._compared), 1))))

    def largest_floor(self, data: np.dtype) -> str:
        """Name of the tolerance that limits the noise of a value of this dtype."""
        if self.continuous and data == FLOAT32 and not self.limits["largest_floor.float32"].given:
            return "largest_scatter.float32"
        return tolerances.name_of(self.limits, "largest_floor", data)

    def measure(
        self, y: np.ndarray, expected: np.ndarray, floor: float | None, data: np.dtype | None = None
    ) -> AgainstNoise:
        """Measure the distance of an output, beside the noise floor.

        Args:
            floor: noise of the reference with the same gates, relative L2; None assumes one.
            data: type that y was computed in; the artifact's by default.
        """
        rounded = (data or self.data) if expected.dtype == np.float32 else expected.dtype
        smallest = self.limits[tolerances.name_of(self.limits, "smallest_floor", rounded)].value
        largest = self.largest_floor(rounded)
        measured = floor is not None
        if floor is None:
            floor = self.limits["assumed_floor"].value if expected.dtype.kind == "f" else 0.0
        # not max(), which would hide a NaN floor
        return AgainstNoise(
            distance(y, expected),
            smallest if floor < smallest else floor,
            largest,
            self.limits[largest].value,
            measured,
        )

    def measure_nearest(self, y: np.ndarray, expected: Iterable[np.ndarray], floor: float | None) -> AgainstNoise:
        """Measure the distance to the nearest of several references."""
        return min((self.measure(y, one, floor) for one in expected), key=lambda found: found.badness)


def keep_worst(kept: dict[str, AgainstNoise], name: str, found: AgainstNoise) -> bool:
    """Keep a measurement if it is worse than the one kept under its name; return whether it was."""
    worst = kept.get(name)
    if worst is not None and found.badness <= worst.badness:
        return False
    kept[name] = found
    return True


def floor_check(name: str, what: str, output: str, found: AgainstNoise, ruler: Ruler, coverage: str) -> Check:
    """Judge the error of an output in multiples of its noise.

    Args:
        what: name of the error in the reason.
        coverage: end of the reason, on the inputs that were compared.
    """
    error, floor, limit = found.error, found.floor, ruler.largest_multiple(found.multiple)
    decided = (
        Quantity(found.floor_name, floor, found.largest_floor),
        Quantity(found.multiple, found.ratio, limit),
    )
    if not floor <= found.largest_floor:
        noise = f"{floor:.1e} (limit {found.largest_floor:g})"
        text = f"{output}: the reference's own noise is {noise}, so nothing can be judged by it"
        return Check(name, "failed", text, decided)
    # not (>): NaN must fail
    good = found.ratio <= limit
    text = f"{output}: {what} {error:.1e}, {found.ratio:.1f}x the noise floor {floor:.1e} (limit {limit:.3g}x)"
    return Check(name, "passed" if good else "failed", text + coverage, decided)
