"""Cost of quantisation against the float model: accuracy on labelled data, answers, signal-to-noise, changed gates.

With fake-quantised PyTorch as the reference, its outputs are compared with those of the float model; where the
reference is a float file, the artifact's.
"""

from __future__ import annotations

from scconv_deploy.records.parity import Check, Quantity, Status
from scconv_deploy.records.tolerances import Table
from scconv_deploy.verification.accuracy import CONFIDENCE, ChangedAnswers, PairedMetric
from scconv_deploy.verification.checks.artifact_run import ArtifactCheck, ArtifactRun, same_kind
from scconv_deploy.verification.metrics import error_and_signal, looks_like_logits, snr_db
from scconv_deploy.verification.reference.run import ReferenceRun

NAME = "budget"
INTERVAL = "budget interval"
TOLERANCE = "max_drop"


class Budget(ArtifactCheck):
    """Check of the cost of quantisation against ``--max-drop``."""

    def __init__(self, limits: Table) -> None:
        self._limit = limits[TOLERANCE]
        self._on_data = False
        self._forget()

    def _forget(self) -> None:
        self._paired = PairedMetric()
        self._squares: dict[str, tuple[float, float]] = {}
        self._gates: dict[str, tuple[int, int]] = {}
        self._answers = ChangedAnswers()

    def add(self, run: ReferenceRun, found: ArtifactRun) -> None:
        if self._on_data and not run.kind:  # noise, beside real data: the scales are not made for it
            return
        if run.kind and not self._on_data:
            self._on_data = True
            self._forget()
        floats = run.unquantized or run.given
        cheap = run.given if run.unquantized else found.outputs
        for name, y in cheap.items():
            if name in floats and same_kind(y, floats[name]) and (sums := error_and_signal(y, floats[name])):
                error, signal = self._squares.get(name, (0.0, 0.0))
                self._squares[name] = error + sums[0], signal + sums[1]
        logits = next((name for name, value in floats.items() if looks_like_logits(value)), None)
        if logits is not None and cheap[logits].shape == floats[logits].shape:
            rows = run.count or len(floats[logits])
            changed = (floats[logits].argmax(1) != cheap[logits].argmax(1))[:rows]
            before = self._answers
            self._answers = ChangedAnswers(before.changed + int(changed.sum()), before.rows + changed.size)
        self._paired.add(floats, cheap, run.labels)
        for site, mask in run.unquantized_masks.items():
            if site in run.sites and run.sites[site].mask.shape == mask.shape:
                moved, gates = self._gates.get(site, (0, 0))
                self._gates[site] = moved + int((mask != run.sites[site].mask).sum()), gates + mask.size

    def checks(self) -> list[Check]:
        if not self._squares:
            return [Check(NAME, "not run", "the reference holds no results of the float model")]
        accuracy = self._paired.accuracy()
        answers = self._answers
        words = [f"{n}: SNR {snr_db(signal, error):.1f} dB" for n, (error, signal) in self._squares.items() if error]
        if answers.rows:
            words.append(f"{answers.changed:,} of {answers.rows:,} answers changed")
        if self._gates:
            moved, gates = (sum(counts[i] for counts in self._gates.values()) for i in (0, 1))
            site, worst = max(self._gates.items(), key=lambda item: item[1][0] / max(item[1][1], 1))
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
        where = "" if self._on_data else " on noise"
        text = f"quantisation costs{where}: {', '.join(words) or 'nothing that could be compared'}"
        if accuracy is None and not answers.rows:
            if not self._limit.given:
                return [Check(NAME, "not run", text)]
            return [Check(NAME, "failed", f"{text}; no output looks like logits, so --max-drop cannot be judged")]
        if accuracy is not None:
            return self._judged(-accuracy.difference, -accuracy.low, self._paired, text)
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
