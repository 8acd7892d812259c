"""End-to-end check of an engine's outputs. NumPy only: it also runs on the device.

Rounding flips some gates of an engine, and its gates cannot be fixed. So the outputs are compared with the *noise*
of the reference: the change of PyTorch's free-running outputs when its gates' inputs are disturbed as the engine's
rounding disturbs them. A fault of that size does not show in the outputs; the SRUs alone (:mod:`.srus`) are judged gate
by gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from scconv_deploy.records.metrics import OutputMetrics
from scconv_deploy.records.parity import Check, EngineOutput, Quantity
from scconv_deploy.runtimes.tensorrt.engine import EngineManifest
from scconv_deploy.verification.checks.answers import check_labels
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.detections import align_rows
from scconv_deploy.verification.metrics import comparable, compare, distance, looks_like_logits
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun


@dataclass(frozen=True)
class _Found:
    """Error of one output on one sample."""

    error: float
    noise: float
    measured: bool
    metrics: OutputMetrics

    @property
    def ratio(self) -> float:
        return self.error / self.noise


def noise_kind(manifest: EngineManifest) -> str:
    """Arithmetic of an engine's layers, as in the names of ``engine_noise``."""
    return "tf32" if "TF32" in manifest.flags and manifest.data_type == "float32" else manifest.data_type


class EndToEnd:
    """Collector of an engine's output errors, sample by sample.

    Args:
        kind: arithmetic of the layers, see :func:`noise_kind`.
        shared: state shared with other checks (contract, NaN, answers, worst inputs).
        where: what computed the outputs, as text.
        quantized: whether codes change as gates do.
    """

    def __init__(self, kind: str, shared: Shared, where: str = "engine", quantized: bool = False) -> None:
        self._limits, self._shared = shared.limits, shared
        self._kind, self._where = kind, where
        self._jumps = "gate and code" if quantized else "gate"
        self._worst: dict[str, _Found] = {}
        self._agreeing = self._rows = 0
        self._changed: list[str] = []

    @property
    def rounding(self) -> str:
        """Type whose rounding the engine's convolutions have, for :meth:`.ReferenceSource.free_noise`."""
        return "float16" if self._kind == "tf32" else self._kind

    def add(self, run: ReferenceRun, found: Arrays, noise: Mapping[str, float]) -> None:
        """Compare the outputs of one sample.

        Args:
            noise: noise of the reference's outputs by name; outputs that were not measured are missing.
        """
        check_labels(run)
        found = align_rows(found, run.given, self._shared.limits["equal_scores"].value)
        for name, given in run.given.items():
            y = found[name]
            if y.shape != given.shape or y.dtype.kind != given.dtype.kind:
                text = f"output {name} is {y.dtype}{list(y.shape)}, PyTorch's {given.dtype}{list(given.shape)}"
                self._shared.contract.note(text)
            elif not comparable(y, given):
                self._shared.finite.note_output(name, run, y, self._where)
            else:
                self._compare(name, y, given, noise.get(name), run)
        self._shared.answers.add(run, found, run.count or None)

    def _compare(self, name: str, y: np.ndarray, given: np.ndarray, noise: float | None, run: ReferenceRun) -> None:
        floating = given.dtype.kind == "f"
        smallest = self._limits[f"engine_noise.{self._kind if floating else 'index'}"].value
        if noise is None and floating:
            smallest = max(smallest, self._limits["engine_noise.unmeasured"].value)
        level = max(smallest, noise or 0.0)
        now = _Found(distance(y, given), level, noise is not None, compare(y, given))
        worst = self._worst.get(name)
        if worst is None or not now.ratio <= worst.ratio:
            self._worst[name] = now
        if looks_like_logits(given):
            self._compare_answers(name, y, given, self._limits["engine_multiple"].value * level, run)

    def _compare_answers(self, name: str, y: np.ndarray, given: np.ndarray, limit: float, run: ReferenceRun) -> None:
        """Compare top-1; it may change only where the reference's two logits are closer than the error allowed."""
        answers, expected = np.argmax(y, axis=1), np.argmax(given, axis=1)
        self._rows += len(given)
        self._agreeing += int(np.sum(answers == expected))
        for row in np.flatnonzero(answers != expected):
            gap = float(given[row, expected[row]]) - float(given[row, answers[row]])
            may = np.sqrt(2) * limit * float(np.linalg.norm(given[row].astype(np.float64)))
            if not gap <= may:
                text = f"{name} [{row}] on {run.sample} answers {answers[row]} instead of {expected[row]}"
                self._changed.append(f"{text}, {gap:.2g} below it (rounding moves it by at most {may:.2g})")

    def outputs(self) -> tuple[EngineOutput, ...]:
        """Error of every output on the sample with the worst ratio."""
        return tuple(EngineOutput(n, f.metrics, f.noise, f.measured) for n, f in self._worst.items())

    def checks(self) -> list[Check]:
        """Checks of the outputs."""
        checks = [self._check(name, found) for name, found in self._worst.items()]
        if self._rows:
            text = f"top-1 agrees on {self._agreeing} of {self._rows}"
            more = f" (and {len(self._changed) - 1} more)" if len(self._changed) > 1 else ""
            checks.append(
                Check("top-1", "failed", self._changed[0] + more)
                if self._changed
                else Check("top-1", "passed", text + ", and elsewhere the two are as close as rounding" * (
                    self._agreeing < self._rows
                ))
            )  # fmt: skip
        return [*checks, *self._shared.checks()]

    def _check(self, name: str, found: _Found) -> Check:
        limit = self._limits["engine_multiple"].value
        # not (>): NaN must fail
        good = found.ratio <= limit
        how = "" if found.measured else ", assumed"
        text = (
            f"{name}: relative L2 {found.error:.1e}, {found.ratio:.2g}x the noise of explained {self._jumps} changes "
        )
        text += f"{found.noise:.1e}{how} (limit {limit:g}x)"
        quantity = Quantity("engine_multiple", found.ratio, limit)
        return Check("end to end", "passed" if good else "failed", text, (quantity,))
