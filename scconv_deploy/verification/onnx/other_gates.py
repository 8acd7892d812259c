"""An artifact's gates of no known SRU: found on the first sample that has them, compared and replayed on every one."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx

from scconv_deploy.errors import ModelError
from scconv_deploy.gate.other_gates import (
    LAYERS,
    UNIT_ROUNDOFF,
    Found,
    Jumped,
    OtherGate,
    OtherGateMeasured,
    count_flips,
    margin_error,
    margin_size,
    mean_error,
    of_few,
)
from scconv_deploy.graph import gates as onnx_gates
from scconv_deploy.graph import instrument
from scconv_deploy.runtimes.half import runner_of
from scconv_deploy.runtimes.onnxruntime import RuntimeOptions
from scconv_deploy.verification.measure import AgainstNoise, Measured
from scconv_deploy.verification.reference.run import Arrays, ReferenceRun, ReferenceSource, RoundedRun


class OtherGateRuns:
    """Part of :class:`.measurement.ArtifactMeasurement`; what it measures is in ``measured.others``."""

    def __init__(
        self, source: ReferenceSource, proto: onnx.ModelProto, measured: Measured, options: RuntimeOptions
    ) -> None:
        self._source, self._proto, self._options, self._measured = source, proto, options, measured
        self._loose = onnx_gates.loose(proto)
        self._nodes = instrument.sites(proto)
        self._untaken: list[str] = []  # comparisons that decide no gate of the reference
        self._known: set[str] = set()
        self._here: list[Found] = []
        self._noisy: set[str] = set()  # outputs that jump in float64 too
        self._jumps: tuple[ReferenceRun, Mapping[str, float]] | None = None

    def align(self, run: ReferenceRun) -> bool:
        """Find those gates of the reference in the artifact that no sample before came to.

        Returns:
            whether others are fixed now than before, so that sessions made for those are of no use.
        """
        new = {name: gate for name, gate in run.others.items() if name not in self._known}
        if new:
            self._find(new, run)
        before, self._here = self._here, [s.found for n, s in self._measured.others.sites.items() if n in run.others]
        return self._here != before

    def _find(self, new: Mapping[str, OtherGate], run: ReferenceRun) -> None:
        self._known |= set(new)
        others = self._measured.others
        wanted = onnx_gates.candidates(self._proto)
        values: Arrays = {}
        if wanted:
            with runner_of(onnx_gates.shown(self._proto, wanted), self._options) as runner:
                values = runner.run(run.inputs)
            taken = {site.found.value for site in others.sites.values()}
            wanted = [one for one in onnx_gates.of_floats(wanted, values) if one.value not in taken]
        found, unfound = onnx_gates.align(new, wanted, values)
        others.unfound |= unfound
        others.sites |= {one.name: OtherGateMeasured(one) for one in found}
        taken = {one.value for one in found}
        self._untaken = [one.node for one in wanted if one.value not in taken]

    def expose(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model itself, with the gates exposed that the last sample aligned came to."""
        onnx_gates.expose(model, self._here)
        return model

    def inject(self, model: onnx.ModelProto) -> onnx.ModelProto:
        """The model itself, with those gates injected."""
        onnx_gates.inject(model, self._here)
        return model

    def compare_same_input(self, run: ReferenceRun, rounded: RoundedRun | None, values: Arrays) -> None:
        """What the artifact decides with the reference's decisions everywhere, and from what."""
        multiple, data = self._measured.limits[self._measured.other_gates].value, self._measured.data
        for name, site in self._measured.others.sites.items():
            gate = run.others.get(name)
            if gate is None or not gate.views or site.found not in self._here:
                continue
            decided, margin = onnx_gates.decision(site.found, values)
            if decided.shape != gate.decided.shape:
                text = f"gate {name} is {list(decided.shape)}, the reference's {list(gate.decided.shape)}"
                self._measured.contract[text] += 1
                continue
            in_half = None if rounded is None else rounded.others.get(name)
            gate = gate if in_half is None else in_half
            site.flips = site.flips + count_flips(gate, site.found, decided, margin, multiple, data, in_half is None)
            if site.found.view is not None:
                self._keep_error(site, gate, margin, in_half is not None)

    def _keep_error(self, site: OtherGateMeasured, gate: OtherGate, margin: np.ndarray, rounded: bool) -> None:
        view = gate.views[site.found.view or 0]
        data = self._measured.data
        unit, few = UNIT_ROUNDOFF.get(data.name, UNIT_ROUNDOFF["float32"]), of_few(margin.size)
        measured = self._measured.limits["assumed_floor"].value if view.error is None else view.error
        if data == np.float32:
            pairs = [(margin_error(view, margin), max(unit, measured) * few)]
        elif rounded:  # what half holds exactly, other right files need not have exactly
            pairs = [(margin_error(view, margin), max(unit * margin_size(view), measured) * few)]
        else:  # rounding has no side: a threshold that was moved shows in the mean, far below what layers add up to
            pairs = [(margin_error(view, margin), max(LAYERS * unit, measured) * few), (mean_error(view, margin), unit)]
        for error, floor in pairs:
            if not site.compared or not error * site.floor <= site.error * floor:
                site.error, site.floor, site.compared = error, floor, True

    def compare_free(self, run: ReferenceRun, values: Arrays) -> None:
        """What the artifact decides as it is: information, for its own decisions before have moved the operands."""
        for name, site in self._measured.others.sites.items():
            gate = run.others.get(name)
            if gate is not None and site.found in self._here:
                decided, _ = onnx_gates.decision(site.found, values)
                if decided.shape == gate.decided.shape:
                    site.free += int((decided != gate.decided).sum())

    # --- where not all can be fixed ------------------------------------------------------------------------------

    def floor(self, run: ReferenceRun, name: str, floor: float | None, largest: float) -> float | None:
        """A noise floor; None (assumed) where float64 jumped, as the reference does on inputs off by rounding."""
        if floor is None or floor <= largest or not self._explains(run, name, floor):
            return floor
        self._noisy.add(name)
        return None

    def excuse(self, run: ReferenceRun, name: str, found: AgainstNoise) -> bool:
        """Whether an error is no more than the reference's own jumps, where not all could be fixed.

        It is noted where it is beyond its limit, which grows with what is compared: the last one decides.

        Args:
            name: of an output, or the site of an SRU whose input differs.
        """
        if found.ratio <= self._measured.largest_multiple(found.multiple):
            return False
        ratio = found.ratio if found.ratio == found.ratio else math.inf
        kept = self._measured.others.jumped.setdefault(name, Jumped(found.multiple))
        may_jump = self._free or self._loose or self._untaken or self._unread(run) or name in self._noisy
        if not may_jump or not self._explains(run, name, found.error):
            kept.beyond = max(kept.beyond, ratio)
            return False
        if ratio > kept.ratio:
            kept.ratio, kept.words = ratio, self._words(run, found.error)
        return True

    @property
    def _free(self) -> list[str]:
        return list(self._measured.others.unfound)

    def _unread(self, run: ReferenceRun) -> list[str]:
        """SRUs that the artifact has no node for, so that their gates are not fixed in it."""
        return [name for name in run.sites if name not in self._nodes and name not in self._measured.redundant]

    def _explains(self, run: ReferenceRun, name: str, error: float) -> bool:
        if self._jumps is None or self._jumps[0] is not run:
            try:
                free = [*(n for n in self._free if n in run.others), *self._unread(run)]
                jumps = self._source.jumps(run, free, self._measured.data.name)
            except ModelError:  # an ONNX file that refuses them
                jumps = {}
            self._jumps = run, jumps
        jump = self._jumps[1].get(name, 0.0)
        return bool(np.isfinite(jump)) and error <= self._measured.limits["jump_multiple"].value * jump

    def _words(self, run: ReferenceRun, error: float) -> str:
        where = [f"{name} ({reason})" for name, reason in self._measured.others.unfound.items()]
        where += [f"{name} (an SRU without a node)" for name in self._unread(run)] + self._loose + self._untaken
        where = where or ["it changes as much on inputs off by rounding, and no gate is known to do it"]
        more = f" and {len(where) - 3} more" if len(where) > 3 else ""
        return f"differs by {error:.1e}; the model jumps, and not all of it can be fixed: {', '.join(where[:3])}{more}"
