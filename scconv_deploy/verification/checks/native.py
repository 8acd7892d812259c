"""Checks of a half file in ONNX Runtime's own arithmetic, which rounds at other places than the file says."""

from __future__ import annotations

from dataclasses import replace

from scconv_deploy.errors import ModelError
from scconv_deploy.graph.types import precision_of
from scconv_deploy.records.parity import Check, Quantity
from scconv_deploy.runtimes.half import HalfRunner, needs_stand_in, runs_here
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, ArtifactRuns, Runner
from scconv_deploy.verification.checks.jumps import Jumps
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.metrics import comparable, distance
from scconv_deploy.verification.reference.run import ReferenceRun
from scconv_deploy.verification.ruler import FLOAT32, AgainstNoise, keep_worst

NAME = "runtime"


class StandIn(ArtifactCheck):
    """Check that says if a stand-in was judged because the artifact cannot run here."""

    def __init__(self, runs: ArtifactRuns) -> None:
        self._runs = runs

    def checks(self) -> list[Check]:
        proto, options = self._runs.proto, self._runs.options
        if not needs_stand_in(proto, options) or runs_here(proto, options):
            return []
        text = f"ONNX Runtime cannot run {precision_of(proto)} here: a stand-in that computes each operator in float32 "
        return [Check("stand-in", "not run", f"{text}and rounds what it gives was judged")]


class Native(ArtifactCheck):
    """Check that the runtime's own outputs are within rounding of the file's arithmetic."""

    def __init__(self, shared: Shared, runs: ArtifactRuns, jumps: Jumps) -> None:
        self._shared, self._runs, self._jumps = shared, runs, jumps
        self._refusal = ""
        self._worst: dict[str, AgainstNoise] = {}

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        if not run.deep or self._shared.ruler.data == FLOAT32 or self._refusal:
            return
        runner = self._runner(run)
        if runner is None:
            return
        outputs = found.aligned(runner.run(run.feeds(runner.inputs)), run.outputs)
        for name, value in run.outputs.items():
            y, rounded = outputs[name], None if found.rounded is None else found.rounded.outputs.get(name)
            if y.shape != value.shape:
                shapes = f"{list(y.shape)}, PyTorch's {list(value.shape)}"
                self._shared.contract.note(f"the runtime's own output {name} is {shapes}")
                continue
            if not comparable(y, value):
                self._shared.finite.note_output(name, run, y, "runtime")
                continue
            near = found.against(name, y, self._jumps.floor(run, name))
            if rounded is not None and rounded.shape == value.shape and comparable(rounded, value):
                # the runtime rounds at fewer places: it may be anywhere between float32 and every value rounded
                near = replace(near, floor=max(near.floor, distance(rounded, value)))
            self._shared.ruler.count(NAME, name)
            keep_worst(self._worst, name, near)

    def _runner(self, run: ReferenceRun) -> Runner | None:
        """Session in the runtime's own arithmetic; None if it refuses (recorded), or if no stand-in is in use."""
        proto, options = self._runs.proto, self._runs.options
        if not needs_stand_in(proto, options):
            return None
        if not runs_here(proto, options):
            self._refusal = "ONNX Runtime cannot run bf16 here"
            return None
        try:
            return self._runs.session("native", lambda: HalfRunner(self._runs.injected(run), options, native=True))
        except ModelError as error:  # the CPU provider lacks a kernel of this type
            self._refusal = error.message
            return None

    def checks(self) -> list[Check]:
        if not self._worst:
            return [Check(NAME, "not run", self._refusal)] if self._refusal else []
        limit = self._shared.ruler.largest_multiple("replay_multiple")
        output, worst = max(self._worst.items(), key=lambda item: item[1].badness)
        good = worst.ratio <= limit
        text = f"ONNX Runtime by itself: {output}: {worst.error:.1e}, {worst.ratio:.1f}x the rounding {worst.floor:.1e}"
        decided = (Quantity("replay_multiple", worst.ratio, limit),)
        return [Check(NAME, "passed" if good else "failed", f"{text} (limit {limit:.3g}x)", decided)]
