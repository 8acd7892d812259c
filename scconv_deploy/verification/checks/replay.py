"""Checks of the replay of an ONNX artifact: each output, and the input of every SRU."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx

from scconv_deploy.graph import instrument
from scconv_deploy.records.parity import Check, LayerError, Quantity
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, ArtifactRuns, other_shape
from scconv_deploy.verification.checks.jumps import Jumps
from scconv_deploy.verification.checks.parts import Parts
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.metrics import comparable
from scconv_deploy.verification.reference.run import ReferenceRun, SiteRun
from scconv_deploy.verification.ruler import FLOAT32, AgainstNoise, floor_check, keep_worst

NAME = "replay"
LAYERS = "layers"


class Replay(ArtifactCheck):
    """Check of each replayed output against the noise floor.

    Attributes:
        outputs: error of each output on the sample with the worst ratio.
        unruled: error of each output of a half artifact on samples without a rounded reference; for information,
            because float32's noise is no limit for half.
        worst_run: sample with the worst ratio of all outputs, without the inputs of its gates.
    """

    def __init__(self, shared: Shared, runs: ArtifactRuns, jumps: Jumps) -> None:
        self._shared, self._jumps = shared, jumps
        self.outputs: dict[str, AgainstNoise] = {}
        self.unruled: dict[str, AgainstNoise] = {}
        self.parts = Parts(shared, jumps)
        self.layers = Layers(shared, runs, jumps)
        self.worst_run: ReferenceRun | None = None

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        if not run.deep:
            return
        if not found.unruled:
            self.layers.add(run, found)
        for name in found.comparable:
            against = found.against(name, found.replayed[name], self._jumps.floor(run, name))
            if found.unruled:
                self._keep_unruled(name, against, run)
            else:
                self._jumps.excuse(run, name, against)
                self.keep(name, against, run)
        if not found.unruled:
            self.parts.add(run, found)

    def keep(self, name: str, found: AgainstNoise, run: ReferenceRun) -> None:
        """Keep the worst error of an output, and its sample."""
        self._shared.ruler.count(NAME, name)
        worst = keep_worst(self.outputs, name, found)
        if worst and found is max(self.outputs.values(), key=lambda f: f.badness):
            self._keep_run(run)

    def _keep_unruled(self, name: str, found: AgainstNoise, run: ReferenceRun) -> None:
        if keep_worst(self.unruled, name, found) and self.worst_run is None:
            self._keep_run(run)

    def _keep_run(self, run: ReferenceRun) -> None:
        # drop the gate inputs: they are large and not needed again
        sites = {site: replace(found, x=None) for site, found in run.sites.items()}
        self.worst_run = replace(run, sites=sites)

    def checks(self) -> list[Check]:
        why = "no rounded reference, and float32's noise is no limit for half; the check rounding judges it"
        unruled = [Check(NAME, "not run", f"{output}: {why}") for output in self.unruled]
        whole = [self._check(*item) for item in self.outputs.items()]
        return whole + self.parts.checks() + unruled + self.layers.checks()

    def _check(self, output: str, found: AgainstNoise) -> Check:
        ruler = self._shared.ruler
        if undecided := self._jumps.undecided(output):
            return Check(NAME, "not run", undecided)
        check = floor_check(NAME, "replay error", output, found, ruler, self._shared.samples.coverage)
        # half may order nearly equal scores either way, so the indices prove nothing
        tied = ruler.data != FLOAT32 and found.floor_name == "largest_floor.index"
        return Check(NAME, "not run", check.reason) if tied and not found.floor <= found.largest_floor else check


class Layers(ArtifactCheck):
    """Check of the input of every SRU in the replay: later layers can hide its error.

    Attributes:
        found: error by ONNX value, the worst ratio over the samples.
        modules: PyTorch module that computes each value.
    """

    def __init__(self, shared: Shared, runs: ArtifactRuns, jumps: Jumps) -> None:
        self._shared, self._jumps, self._nodes = shared, jumps, runs.nodes
        self._producers = {output: node for node in runs.proto.graph.node for output in node.output}
        self.found: dict[str, AgainstNoise] = {}
        self.modules: dict[str, str] = {}

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        for name, site in run.sites.items():
            x = found.forced.get(instrument.gate_input(name))
            if x is None or site.x is None:
                continue
            if x.shape != site.x.shape:
                self._shared.contract.note(other_shape(name, x, site.x))
            elif not comparable(x, site.x):
                self._shared.finite.note(f"the input of {name} with the reference's gates", run)
            else:
                against = self._against(site, x, site.x, found)
                if not self._jumps.excuse(run, name, against):
                    value = self._before_reshapes(self._nodes[name])
                    producer = self._producers.get(value)
                    module = "" if producer is None else instrument.module_of(producer)
                    self.keep(value, module, against)

    def _against(self, site: SiteRun, x: np.ndarray, expected: np.ndarray, found: ArtifactRun) -> AgainstNoise:
        if found.rounded is None:
            return self._shared.ruler.measure(x, expected, site.floor)
        noise = found.rounded.input_floors.get(site.site.name, site.floor)
        rounded = found.rounded.inputs.get(site.site.name)
        right = [expected] if rounded is None or rounded.shape != x.shape else [rounded, expected]
        return self._shared.ruler.measure_nearest(x, right, noise)

    def _before_reshapes(self, node: onnx.NodeProto) -> str:
        """Name of an SRU's input value before its module reshapes it to ``[N, C, H, W]``."""
        value = node.input[0]
        while (producer := self._producers.get(value)) is not None and producer.op_type in ("Reshape", "Unsqueeze"):
            if instrument.module_of(producer) != instrument.module_of(node):
                break
            value = producer.input[0]
        return value

    def keep(self, value: str, module: str, found: AgainstNoise) -> None:
        """Keep the worst error that can be judged; one whose noise is too large only if there is no other."""
        self._shared.ruler.count(LAYERS, value)
        worst = self.found.get(value)
        if worst is None or self._badness(found) > self._badness(worst):
            self.found[value], self.modules[value] = found, module

    def _badness(self, layer: AgainstNoise) -> tuple[bool, float]:
        return layer.floor <= self._largest_floor, layer.sortable_ratio

    @property
    def _largest_floor(self) -> float:
        ruler = self._shared.ruler
        return ruler.limits[ruler.largest_floor(ruler.data)].value

    @property
    def errors(self) -> tuple[LayerError, ...]:
        """Errors of the layers for the report."""
        return tuple(LayerError(name, self.modules[name], v.error, v.floor) for name, v in self.found.items())

    def checks(self) -> list[Check]:
        if not self.found:
            return []
        largest, multiple = self._largest_floor, next(iter(self.found.values())).multiple  # all are of one type
        limit = self._shared.ruler.largest_multiple(multiple)
        layers = {name: layer for name, layer in self.found.items() if layer.floor <= largest}
        left = {name: layer for name, layer in layers.items() if not layer.ratio <= limit}
        noisy = len(self.found) - len(layers)
        unjudged = f"; {noisy} not judged, for their own noise is above {largest:g}" if noisy else ""
        if not layers:
            return [Check(LAYERS, "not run", unjudged.removeprefix("; "))]
        decided = (Quantity(multiple, max(layer.ratio for layer in layers.values()), limit),)
        if not left:
            coverage = self._shared.samples.coverage
            text = f"{len(layers)} inputs of SRUs stay within {limit:.3g}x their noise{coverage}{unjudged}"
            return [Check(LAYERS, "passed", text, decided)]
        name, first = next(iter(left.items()))
        noise = f"{first.ratio:.1f}x the noise floor {first.floor:.1e} (limit {limit:.3g}x)"
        more = f", and {len(left) - 1} more" if len(left) > 1 else ""
        text = f"{name} ({self.modules[name] or 'module unknown'}): {first.error:.1e}, {noise}{more}"
        return [Check(LAYERS, "failed", text, decided)]
