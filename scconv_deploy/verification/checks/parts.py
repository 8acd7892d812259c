"""Check of the parts of an ONNX artifact's outputs in the replay: the error of a whole output does not show them."""

from __future__ import annotations

from scconv_deploy.records.parity import Check, Quantity, Status
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun
from scconv_deploy.verification.checks.jumps import Jumps
from scconv_deploy.verification.checks.shared import Shared
from scconv_deploy.verification.metrics import is_lost, parts
from scconv_deploy.verification.reference.run import ReferenceRun
from scconv_deploy.verification.ruler import FLOAT32, AgainstNoise

NAME = "parts"


class Parts(ArtifactCheck):
    """Check of the parts of outputs, see :func:`.metrics.parts`, against their own noise.

    In float32 their noise has no limit: a sigmoid of -10 is a thousandth of its value off in every runtime. In half it
    has the limit of the whole output's; a part beyond it is named, and has no verdict.

    Attributes:
        judged: error of each part on the sample with the worst ratio.
        noisy: parts whose noise was too large on some sample, and the largest noise.
        lost: parts that are zeros in half on some sample.
    """

    def __init__(self, shared: Shared, jumps: Jumps) -> None:
        self._shared, self._jumps = shared, jumps
        self.judged: dict[str, AgainstNoise] = {}
        self.noisy: dict[str, AgainstNoise] = {}
        self.lost: set[str] = set()

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        for output in found.comparable if run.part_floors else ():
            if self._jumps.may_jump(run, output):
                continue
            for part in parts(output, run.outputs[output]):
                if (against := found.against_part(part)) is not None:
                    self._keep(part.name, against)
                elif found.rounded is not None and is_lost(part, run.outputs, found.rounded.outputs):
                    self.lost.add(part.name)

    def _keep(self, name: str, found: AgainstNoise) -> None:
        if self._shared.ruler.data != FLOAT32 and not found.floor <= found.largest_floor:
            worst = self.noisy.get(name)
            if worst is None or found.floor > worst.floor:
                self.noisy[name] = found
            return
        self._shared.ruler.count(NAME, name)
        worst = self.judged.get(name)
        if worst is None or found.sortable_ratio > worst.sortable_ratio:
            self.judged[name] = found

    def checks(self) -> list[Check]:
        unjudged = self._unjudged()
        if not self.judged:
            return [Check(NAME, "not run", unjudged)] if unjudged else []
        name, worst = max(self.judged.items(), key=lambda item: item[1].sortable_ratio)
        limit = self._shared.ruler.largest_multiple(worst.multiple)
        text = f"{name}: {worst.error:.1e}, {worst.ratio:.1f}x its noise {worst.floor:.1e} (limit {limit:.3g}x)"
        if len(self.judged) > 1:
            text = f"{len(self.judged)} parts of outputs, the worst {text}"
        text += self._shared.samples.coverage + (f"; {unjudged}" if unjudged else "")
        status: Status = "passed" if worst.ratio <= limit else "failed"
        return [Check(NAME, status, text, (Quantity(worst.multiple, worst.ratio, limit),))]

    def _unjudged(self) -> str:
        """What was not judged, and why; "" if all was."""
        words = []
        if self.noisy:
            name, noisiest = max(self.noisy.items(), key=lambda item: item[1].floor)
            largest = f"{name}: {noisiest.floor:.1e}, limit {noisiest.largest_floor:g}"
            words.append(f"{len(self.noisy)} not judged where their own noise is too large ({largest})")
        if self.lost:
            words.append(f"{len(self.lost)} not judged where they are zeros in half ({min(self.lost)})")
        return "; ".join(words)
