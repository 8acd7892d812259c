"""What values are held against: tolerances, scaled by the noise of the reference's own right runs. No onnx in it."""

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
    """An output's distance and the reference's own rounding noise, see :func:`.metrics.distance`.

    Attributes:
        floor_name, largest_floor: the tolerance that limits the noise.
        measured: whether the noise was; else it is assumed.
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
    def multiple(self) -> str:
        """The name of the tolerance that limits the ratio."""
        return "half_multiple" if self.floor_name.endswith(("float16", "bfloat16")) else "replay_multiple"

    @property
    def badness(self) -> tuple[bool, float]:
        """Grows with what is wrong: a floor above the largest one proves nothing, however small the ratio to it."""
        ratio = self.ratio
        return not self.floor <= self.largest_floor, ratio if ratio == ratio else float("inf")


@dataclass
class Ruler:
    """Tolerances of one artifact, and what the samples say of the reference's noise.

    Attributes:
        limits: the tolerances that noise floors are clamped to.
        data: the type of the artifact's data, whose rounding no float output is below.
        spread: by which factor right runs of the reference scatter, the largest over the samples; ``half_spread`` those
            of the rounded reference.
        continuous: whether the reference was seen to be, on every sample whose noise is large; None if there is none.
        float64_refusal: why float64 is not among the runs whose distance is the noise.
    """

    limits: Table
    data: np.dtype = FLOAT32
    spread: float = 1.0
    half_spread: float = 1.0
    continuous: bool | None = None
    float64_refusal: str = ""
    _compared: set[tuple[str, str]] = field(default_factory=set)

    def add(self, run: ReferenceRun) -> None:
        """Take over what a sample says of the reference's noise, before it is compared."""
        self.float64_refusal = run.float64_refusal
        self.spread = max(self.spread, run.spread)
        usual = self.limits["largest_floor.float32"].value
        floors = [*run.floors.values(), *(site.floor for site in run.sites.values())]
        if any(floor is not None and not floor <= usual for floor in floors):
            self.continuous = run.continuous and self.continuous is not False

    def add_rounded(self, run: RoundedRun) -> None:
        """Take over the same of the reference with every value rounded."""
        self.half_spread = max(self.half_spread, run.spread)

    def count(self, check: str, value: str) -> None:
        """Note that a check holds a value against its noise: the more are compared, the larger the largest may be."""
        self._compared.add((check, value))

    def largest_multiple(self, name: str) -> float:
        """Multiples of its noise that the worst of all values compared may be off.

        The largest of n draws whose logarithms have the deviation ln(spread) is about spread^sqrt(2 ln n).

        Args:
            name: of the tolerance for one value, ``replay_multiple`` or ``half_multiple``.
        """
        tolerance = self.limits[name]
        if tolerance.given:
            return tolerance.value
        smallest, largest = (tolerances.FIXED[f"{name}_spread"].value for name in ("smallest", "largest"))
        spread = min(max(self.half_spread if name == "half_multiple" else self.spread, smallest), largest)
        return float(tolerance.value * spread ** math.sqrt(2 * math.log(max(len(self._compared), 1))))

    def largest_floor(self, data: np.dtype) -> str:
        """The name of the tolerance that limits the noise of a value of this type."""
        if self.continuous and data == FLOAT32 and not self.limits["largest_floor.float32"].given:
            return "largest_scatter.float32"
        return tolerances.name_of(self.limits, "largest_floor", data)

    def measure(
        self, y: np.ndarray, expected: np.ndarray, floor: float | None, data: np.dtype | None = None
    ) -> AgainstNoise:
        """A distance, beside the reference's noise with the same gates (floor; None: assumed).

        Args:
            data: the type that y was computed in; the artifact's by default.
        """
        rounded = (data or self.data) if expected.dtype == np.float32 else expected.dtype
        smallest = self.limits[tolerances.name_of(self.limits, "smallest_floor", rounded)].value
        largest = self.largest_floor(rounded)
        measured = floor is not None
        if floor is None:
            floor = self.limits["assumed_floor"].value if expected.dtype.kind == "f" else 0.0
        # not max(), which would hide a floor that is not a number
        return AgainstNoise(
            distance(y, expected),
            smallest if floor < smallest else floor,
            largest,
            self.limits[largest].value,
            measured,
        )

    def measure_nearest(self, y: np.ndarray, expected: Iterable[np.ndarray], floor: float | None) -> AgainstNoise:
        """The same of what is right in several ways: the one that y is nearest to."""
        return min((self.measure(y, one, floor) for one in expected), key=lambda found: found.badness)


def keep_worst(kept: dict[str, AgainstNoise], name: str, found: AgainstNoise) -> bool:
    """Keep what is worse than what was kept under this name; whether it is."""
    worst = kept.get(name)
    if worst is not None and found.badness <= worst.badness:
        return False
    kept[name] = found
    return True


def floor_check(name: str, what: str, output: str, found: AgainstNoise, ruler: Ruler, coverage: str) -> Check:
    """Judge an output by its noise.

    Args:
        what: the error in words.
        coverage: closes the reason.
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
    # not (>), so that a ratio that is not a number fails
    good = found.ratio <= limit
    text = f"{output}: {what} {error:.1e}, {found.ratio:.1f}x the noise floor {floor:.1e} (limit {limit:.3g}x)"
    return Check(name, "passed" if good else "failed", text + coverage, decided)
