"""Cost of quantisation against the float model: accuracy on labelled data, answers, signal-to-noise, changed gates.

With fake-quantised PyTorch as the reference, its outputs are compared with those of the float model; where the
reference is a float file, the artifact's.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scconv_deploy.records.parity import Check, Quantity, Status
from scconv_deploy.records.tolerances import Table
from scconv_deploy.verification.accuracy import CONFIDENCE, NO_LOGITS, ChangedAnswers, PairedMetric
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, same_kind
from scconv_deploy.verification.metrics import error_and_signal, looks_like_logits, snr_db
from scconv_deploy.verification.reference.run import ReferenceRun

NAME = "budget"
INTERVAL = "budget interval"
TOLERANCE = "max_drop"


@dataclass
class Costs:
    """What quantisation changes over samples; sums, so that they merge exactly.

    Attributes:
        on_data: whether the samples are real data, not noise.
        paired: the task's metric on labelled data.
        outputs: squared norms of the error and of the output, by output.
        gates: changed and all gates by site.
        answers: changed and all answers.
    """

    on_data: bool = False
    paired: PairedMetric = field(default_factory=PairedMetric)
    outputs: dict[str, tuple[float, float]] = field(default_factory=dict)
    gates: dict[str, tuple[int, int]] = field(default_factory=dict)
    answers: ChangedAnswers = field(default_factory=ChangedAnswers)

    def add_output(self, name: str, error: float, signal: float) -> None:
        before = self.outputs.get(name, (0.0, 0.0))
        self.outputs[name] = before[0] + error, before[1] + signal

    def add_gates(self, site: str, changed: int, gates: int) -> None:
        before = self.gates.get(site, (0, 0))
        self.gates[site] = before[0] + changed, before[1] + gates

    def merge(self, other: Costs) -> None:
        """Add the costs on other samples of the same kind."""
        self.paired.merge(other.paired)
        for name, sums in other.outputs.items():
            self.add_output(name, *sums)
        for site, counts in other.gates.items():
            self.add_gates(site, *counts)
        self.answers += other.answers


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
            if name in floats and same_kind(y, floats[name]) and (sums := error_and_signal(y, floats[name])):
                costs.add_output(name, *sums)
        logits = next((name for name, value in floats.items() if looks_like_logits(value)), None)
        if logits is not None and cheap[logits].shape == floats[logits].shape:
            rows = run.count or len(floats[logits])
            changed = (floats[logits].argmax(1) != cheap[logits].argmax(1))[:rows]
            costs.answers += ChangedAnswers(int(changed.sum()), changed.size)
        costs.paired.add(floats, cheap, run.labels)
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
        outputs, gates_by_site, answers = self.costs.outputs, self.costs.gates, self.costs.answers
        if not outputs:
            return [Check(NAME, "not run", "the reference holds no results of the float model")]
        accuracy = self.costs.paired.accuracy()
        words = [f"{n}: SNR {snr_db(signal, error):.1f} dB" for n, (error, signal) in outputs.items() if error]
        if answers.rows:
            words.append(f"{answers.changed:,} of {answers.rows:,} answers changed")
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
                0, f"{accuracy.name} {accuracy.artifact:.2%} against {accuracy.reference:.2%} in float, a drop of "
                f"{drop:.2%} ({accuracy.confidence:.0%} interval {0.0 - accuracy.high:.2%} to "
                f"{0.0 - accuracy.low:.2%}, {accuracy.samples:,} rows)",
            )  # fmt: skip
        where = "" if self.costs.on_data else " on noise"
        text = f"quantisation costs{where}: {', '.join(words) or 'nothing that could be compared'}"
        if accuracy is None and not answers.rows:
            if not self._limit.given:
                return [Check(NAME, "not run", text)]
            why = self.costs.paired.reason or NO_LOGITS
            return [Check(NAME, "failed", f"{text}; {why}, so --max-drop cannot be judged")]
        if accuracy is not None:
            return self._judged(-accuracy.difference, -accuracy.low, self.costs.paired, text)
        if self._limit.given:
            text += "; without labels the share of changed answers bounds the drop"
        return self._judged(answers.share, answers.interval()[1], answers, text)

    def _judged(self, cost: float, most: float, counts: PairedMetric | ChangedAnswers, text: str) -> list[Check]:
        """Judge a loss of accuracy by its estimate, and say if its interval goes further; without a budget neither.

        Args:
            most: upper end of its interval.
        """
        limit = self._limit.value
        quantity = Quantity(TOLERANCE, cost, limit)
        if not self._limit.given and quantity.within:
            return [Check(NAME, "not run", f"{text}; no limit was set (--max-drop)")]
        status: Status = "passed" if quantity.within else "failed"
        judged = Check(NAME, status, f"{text} (budget {limit:.2%})", (quantity,))
        if status == "failed" or most <= limit:
            return [judged]
        needed = counts.rows_needed(limit)
        enough = "no number of rows at this drop would" if needed is None else f"about {needed:,} rows would"
        why = (
            f"too few rows to show that the budget of {limit:.2%} holds: the {CONFIDENCE:.0%} interval of the drop "
            f"goes to {most:.2%}; {enough} show it"
        )
        return [judged, Check(INTERVAL, "not run", why, (Quantity(TOLERANCE, most, limit),))]
