"""Check of an engine's segments: the layers between its SRUs, from the engine's own tensors. NumPy only.

PyTorch runs with the engine's output in place of each SRU's. So each SRU's input in PyTorch follows from the engine's
own tensors through one segment, without a gate in between, and is compared with the engine's. A fault shows in the
segment where it is and in none after it. The segments of an int8 engine round to codes, in PyTorch too: codes that
rounding moves are part of the noise, which is measured by disturbing what the quantisers round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.records.quantization import is_code
from scconv_deploy.verification import metrics
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.engine.inside import Ends
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun, ReferenceSource

_NO_PYTORCH = "the reference is no model in PyTorch, so it cannot start from an engine's tensor"
_OTHER_GATES = "the model has gates of no known SRU, which an engine does not show"


@dataclass(frozen=True)
class _Error:
    """Error at the end of a segment, and the noise there, relative L2."""

    error: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.error / self.noise


class Segments:
    """Collector of the errors of an engine's segments.

    Args:
        kind: arithmetic of its layers, see :func:`.outputs.noise_kind`.
        shown: whether it shows its SRUs' ends, so that there is something to judge.
        quantized: whether codes change as gates do.
    """

    def __init__(
        self, kind: str, source: ReferenceSource, shared: Shared, shown: bool, quantized: bool = False
    ) -> None:
        self._kind, self._source, self._limits = kind, source, shared.limits
        self._shown, self._quantized = shown, quantized
        self._errors: dict[str, _Error] = {}
        self._not_run = ""

    def add(self, run: ReferenceRun, ends: Mapping[str, Ends], found: Arrays) -> None:
        """Compare the end of each segment on one sample.

        Args:
            ends: of the engine's SRUs.
            found: the engine's outputs. They end the last segments, unless some are indices, which jump.
        """
        missing = [name for name in run.sites if name not in ends]
        if missing or not all(map(is_code, run.others)):
            self._not_run = f"the ends of {missing[0]} cannot be read" if missing else _OTHER_GATES
            return
        expected = self._source.between(run, {name: end.y for name, end in ends.items()})
        if expected is None:
            self._not_run = _NO_PYTORCH
            return
        inputs, outputs = expected
        moved: tuple[Arrays, Arrays] = ({}, {})
        if run.others:
            rounding = "float16" if self._kind == "tf32" else self._kind
            moved = self._source.between_noise(run, {name: end.y for name, end in ends.items()}, rounding) or moved
        for name, x in inputs.items():
            self._compare(f"before {name}", ends[name].x, x, moved[0].get(name))
        if all(value.dtype.kind == "f" and value.shape == found[name].shape for name, value in outputs.items()):
            for name, value in outputs.items():
                self._compare(f"before output {name}", found[name], value, moved[1].get(name))

    def _compare(self, place: str, y: np.ndarray, expected: np.ndarray, codes: np.ndarray | None) -> None:
        """Keep the worst error of a segment, in units of its noise: rounding, and the codes that it moves."""
        noise = max(self._limits[f"engine_noise.{self._kind}"].value, 0.0 if codes is None else float(codes))
        now = _Error(metrics.distance(y, expected), noise)
        worst = self._errors.get(place)
        if worst is None or not now.ratio <= worst.ratio:
            self._errors[place] = now

    def checks(self) -> list[Check]:
        """Check of the segments; empty for an engine built without debug tensors."""
        if not self._shown:
            return []
        name = "segments"
        limit = self._limits["engine_multiple"].value
        worst = max((error.ratio for error in self._errors.values()), default=0.0)
        decided = Quantity("engine_multiple", worst, limit)
        departing = [place for place, error in self._errors.items() if not error.ratio <= limit]
        if not departing and (self._not_run or not self._errors):
            return [Check(name, "not run", self._not_run or "no sample was run in full")]
        place = departing[0] if departing else max(self._errors, key=lambda name: self._errors[name].ratio)
        found = self._errors[place]
        codes = " and of codes" if self._quantized else ""
        size = (
            f"relative L2 {found.error:.1e}, {found.ratio:.2g}x the rounding of {self._kind}{codes} (limit {limit:g}x)"
        )
        if not departing:
            count = len(self._errors)
            text = f"{count} segments from its own tensors: the worst, {place}, {size}"
            return [Check(name, "passed", text, (decided,))]
        more = f"; so do {len(departing) - 1} more" if len(departing) > 1 else ""
        return [Check(name, "failed", f"the segment {place} departs first: {size}{more}", (decided,))]
