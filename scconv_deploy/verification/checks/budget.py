"""Cost of quantisation against the float model: accuracy on labelled data, answers, signal-to-noise, changed gates.

With fake-quantised PyTorch as the reference, its outputs are compared with those of the float model; where the
reference is a float file, the artifact's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scconv_deploy.records.parity import Check, Quantity, Status
from scconv_deploy.records.tolerances import Table
from scconv_deploy.verification.accuracy import PairedCounts
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, same_kind
from scconv_deploy.verification.metrics import MetricsTally, comparable, compare, looks_like_logits
from scconv_deploy.verification.reference.run import ReferenceRun

NAME = "budget"
TOLERANCE = "max_drop"


@dataclass
class Costs:
    """What quantisation changes over samples; sums, so that they merge exactly.

    Attributes:
        on_data: whether the samples are real data, not noise.
        paired: right and wrong answers on labelled data.
        outputs: metrics of the outputs.
        gates: changed and all gates by site.
        answers: changed and all answers.
    """

    on_data: bool = False
    paired: PairedCounts = field(default_factory=PairedCounts)
    outputs: MetricsTally = field(default_factory=MetricsTally)
    gates: dict[str, tuple[int, int]] = field(default_factory=dict)
    answers: tuple[int, int] = (0, 0)

    def add_gates(self, site: str, changed: int, gates: int) -> None:
        before = self.gates.get(site, (0, 0))
        self.gates[site] = before[0] + changed, before[1] + gates

    def merge(self, other: Costs) -> None:
        """Add the costs on other samples of the same kind."""
        self.paired.merge(other.paired)
        self.outputs.merge(other.outputs)
        for site, counts in other.gates.items():
            self.add_gates(site, *counts)
        self.answers = self.answers[0] + other.answers[0], self.answers[1] + other.answers[1]


class Budget(ArtifactCheck):
    """Check of the cost of quantisation against ``--max-drop``."""

    def __init__(self, limits: Table) -> None:
        self._limit = limits[TOLERANCE]
        self.costs = Costs()

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        if self.costs.on_data and not run.kind:  # noise, beside real data: the scales are not made for it
            return
        if run.kind and not self.costs.on_data:
            self.costs = Costs(on_data=True)
        costs = self.costs
        floats = run.unquantized or run.given
        cheap = run.given if run.unquantized else found.outputs
        for name, y in cheap.items():
            if name in floats and same_kind(y, floats[name]) and comparable(y, floats[name]):
                costs.outputs.add(name, compare(y, floats[name]), len(y) if y.ndim else 1)
        logits = next((name for name, value in floats.items() if looks_like_logits(value)), None)
        if logits is not None and cheap[logits].shape == floats[logits].shape:
            rows = run.count or len(floats[logits])
            changed = (floats[logits].argmax(1) != cheap[logits].argmax(1))[:rows]
            costs.answers = costs.answers[0] + int(changed.sum()), costs.answers[1] + changed.size
            if run.labels is not None and len(run.labels) == len(floats[logits]):
                costs.paired.add(floats[logits], cheap[logits], run.labels)
        for site, mask in run.unquantized_masks.items():
            if site in run.sites and run.sites[site].mask.shape == mask.shape:
                costs.add_gates(site, int((mask != run.sites[site].mask).sum()), mask.size)

    def merge(self, costs: Costs) -> None:
        """Add the costs on further samples; those on noise do not count beside real data."""
        if costs.on_data and not self.costs.on_data:
            self.costs = Costs(on_data=True)
        if costs.on_data == self.costs.on_data:
            self.costs.merge(costs)

    def checks(self) -> list[Check]:
        outputs, gates_by_site = self.costs.outputs.metrics, self.costs.gates
        if not outputs:
            return [Check(NAME, "not run", "the reference holds no results of the float model")]
        accuracy = self.costs.paired.accuracy()
        changed, answers = self.costs.answers
        words = [f"{n}: SNR {m.snr_db:.1f} dB" for n, m in outputs.items() if m.snr_db is not None]
        if answers:
            words.append(f"{changed:,} of {answers:,} answers changed")
        if gates_by_site:
            moved, gates = (sum(counts[i] for counts in gates_by_site.values()) for i in (0, 1))
            site, worst = max(gates_by_site.items(), key=lambda item: item[1][0] / max(item[1][1], 1))
            words.append(
                f"{moved:,} of {gates:,} gates changed ({moved / max(gates, 1):.2%}; most at {site}, "
                f"{worst[0] / max(worst[1], 1):.2%})"
            )
        if accuracy is not None:
            drop = -accuracy.difference + 0.0  # no -0.00 %
            words.insert(
                0, f"accuracy {accuracy.artifact:.2%} against {accuracy.reference:.2%} in float, a drop of {drop:.2%} "
                f"({accuracy.confidence:.0%} interval {-accuracy.high:.2%} to {-accuracy.low:.2%}, "
                f"{accuracy.samples:,} rows)",
            )  # fmt: skip
        where = "" if self.costs.on_data else " on noise"
        text = f"quantisation costs{where}: {', '.join(words) or 'nothing that could be compared'}"
        if accuracy is None and not answers:
            if not self._limit.given:
                return [Check(NAME, "not run", text)]
            return [Check(NAME, "failed", f"{text}; no output looks like logits, so --max-drop cannot be judged")]
        cost = -accuracy.difference if accuracy is not None else changed / answers
        if accuracy is None and self._limit.given:
            text += "; without labels the share of changed answers bounds the drop"
        return [self.judged(cost, text)]

    def judged(self, cost: float, text: str) -> Check:
        """Judge a loss of accuracy; without a budget it is shown alone."""
        quantity = Quantity(TOLERANCE, cost, self._limit.value)
        if not self._limit.given and quantity.within:
            return Check(NAME, "not run", f"{text}; no budget was set (--max-drop)")
        status: Status = "passed" if quantity.within else "failed"
        return Check(NAME, status, f"{text} (budget {self._limit.value:.2%})", (quantity,))
