"""The largest int8 plan within a budget, found by measuring plans as a whole.

all sites in int8 --> (beyond the budget) each site alone, for the order --> bisect the number of sites left in float
--> put sites back, those with the most multiply-adds first

The worst sites are left in float first: those with the most noise for a multiply-add. Noise alone would leave a large
layer in float where three small ones would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from scconv_deploy.errors import ParityError, UsageError
from scconv_deploy.records.sensitivity import BudgetSearch, Cost, SearchStep, Sensitivity
from scconv_deploy.records.stage import Progress
from scconv_deploy.report.sensitivity import as_options
from scconv_deploy.verification.costs import CostMeter
from scconv_deploy.workflows.calibrate import CalibrationOptions, Rows
from scconv_deploy.workflows.plans import Plans
from scconv_deploy.workflows.sensitivity import sensitivity_of

_TRIED_BACK = 8
"""Sites that are tried in int8 again after the bisection; each costs a pass over all data."""

_LEAST_WORK = 0.1
"""Multiply-adds that a site counts for at least, in parts of an average one: a skip has none, and a harmless one is not
worth float."""


@dataclass(frozen=True)
class Budget:
    """Largest cost of int8 that is accepted.

    Attributes:
        text: as it was given.
        kind: ``share`` of accuracy lost (without labels, of answers changed), or ``snr_db`` of the worst output.
        limit: largest share, or lowest signal-to-noise ratio in dB.
    """

    text: str
    kind: Literal["share", "snr_db"]
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``0.5%``, ``0.005`` or ``40dB`` (UsageError otherwise)."""
        lowered = text.strip().lower()
        decibels, percent = lowered.endswith("db"), lowered.endswith("%")
        try:
            number = float(lowered.removesuffix("db").removesuffix("%"))
        except ValueError:
            number = float("nan")
        limit = number / 100 if percent else number
        if not (0 < limit < float("inf") if decibels else 0 <= limit <= 1):
            raise UsageError(
                f"--budget {text!r} is neither a share nor decibels.",
                "Write 0.5% (accuracy lost; without labels, answers changed) or 40dB (signal-to-noise of the outputs).",
            )
        return cls(text, "snr_db" if decibels else "share", limit)

    def spent(self, cost: Cost) -> float | None:
        """Cost in the budget's unit, the larger the worse; None if it cannot be said."""
        if self.kind == "snr_db":
            return -cost.snr_db
        return cost.answers_changed if cost.drop is None else cost.drop

    def meets(self, cost: Cost) -> bool:
        """Whether a cost is within the budget."""
        spent = self.spent(cost)
        return spent is not None and spent <= (-self.limit if self.kind == "snr_db" else self.limit)

    def words(self, cost: Cost) -> str:
        """Cost in the budget's unit, as text."""
        if self.kind == "snr_db":
            return f"SNR {cost.snr_db:.1f} dB"
        if cost.drop is not None:
            return f"accuracy falls by {cost.drop:.2%}"
        return f"{cost.changed:,} of {cost.answers:,} answers change"


def find_plan(
    plans: Plans, rows: Rows, budget: Budget, calibration: CalibrationOptions, model: str, progress: Progress
) -> BudgetSearch:
    """Find the largest plan by multiply-adds within a budget. Plans are measured on all rows, sites on the first ones.

    The number of sites in float is found by bisection; then those with the most multiply-adds are put back where the
    budget allows it.

    Args:
        calibration: its number of rows is the one on which sites are measured.
        model: name of the float file.

    Raises:
        UsageError: the budget is a share, and no output looks like logits.
        ParityError: no plan meets the budget; the nearest one is named.
    """
    return _Search(plans, rows, budget, calibration, model, progress).run()


class _Search:
    def __init__(
        self,
        plans: Plans,
        rows: Rows,
        budget: Budget,
        calibration: CalibrationOptions,
        model: str,
        progress: Progress,
    ) -> None:
        self._plans, self._budget, self._model, self._progress = plans, budget, model, progress
        self._rows, self._samples = rows, calibration.samples
        self._meter = CostMeter(plans.proto, lambda: rows.batches(None), progress)
        self._steps: list[SearchStep] = []
        self._kept: list[tuple[str, ...]] = []
        self._names = [site.name for site in plans.sites]

    def run(self) -> BudgetSearch:
        if self._within((), "all sites in int8"):
            return self._result(None)
        if self._budget.spent(self._steps[0].cost) is None:
            raise UsageError(
                f"--budget {self._budget.text} is about answers, and no output of {self._model} looks like logits.",
                "Give a budget in decibels, as --budget 40dB.",
            )
        meter = CostMeter(self._plans.proto, lambda: self._rows.batches(self._samples), self._progress)
        found = sensitivity_of(self._plans, meter, self._model)
        order = self._order(found)
        if not order or not self._within(order, _words(len(order))):
            raise self._refusal()
        beyond, within = 0, len(order)
        while within - beyond > 1:
            middle = (beyond + within) // 2
            if self._within(order[:middle], _words(middle)):
                within = middle
            else:
                beyond = middle
        self._put_back(order[:within])
        return self._result(found)

    def _order(self, found: Sensitivity) -> list[str]:
        """Sites in the order in which they are left in float; without the last layer, for one must be in int8."""
        adds = {site.name: site.multiply_adds or 0 for site in self._plans.sites}
        least = max(sum(adds.values()) * _LEAST_WORK / len(adds), 1.0)
        order = sorted(found.sites, key=lambda one: -one.cost.noise / max(adds[one.site], least))
        last = next(one.site for one in reversed(order) if one.kind != "Add")
        return [one.site for one in order if one.site != last]

    def _put_back(self, kept: list[str]) -> None:
        """Try sites in int8 again; the last of them was just found to be too much."""
        adds = {site.name: site.multiply_adds or 0 for site in self._plans.sites}
        for site in sorted(kept[:-1], key=lambda name: -adds[name])[:_TRIED_BACK]:
            fewer = [name for name in kept if name != site]
            if self._within(fewer, f"{site} in int8 again"):
                kept = fewer

    def _within(self, kept: Sequence[str], plan: str) -> bool:
        """Measure a plan on all data, and record it."""
        names = tuple(name for name in self._names if name in kept)
        cost = self._meter.measure({plan: partial(self._plans.without, names)})[plan]
        counts = [site.multiply_adds for site in self._plans.sites if site.name not in names]
        known = None if None in counts else sum(count for count in counts if count is not None)
        met = self._budget.meets(cost)
        self._steps.append(SearchStep(plan, len(names), self._plans.share_of(known), cost, met))
        self._kept.append(names)
        return met

    def _result(self, found: Sensitivity | None) -> BudgetSearch:
        index = max(number for number, step in enumerate(self._steps) if step.within)
        return BudgetSearch(self._budget.text, len(self._names), self._kept[index], tuple(self._steps), index, found)

    def _refusal(self) -> ParityError:
        """Error that names the plan nearest to the budget."""
        index = min(range(len(self._steps)), key=lambda number: self._budget.spent(self._steps[number].cost) or 0.0)
        step, kept = self._steps[index], self._kept[index]
        left = [name for name in self._names if name not in kept]
        share = "" if step.multiply_adds_share is None else f" ({step.multiply_adds_share:.1%} of the multiply-adds)"
        how = "It is quantize without --budget."
        if kept:
            option, names = ("--only", left) if len(left) < len(kept) else ("--keep", kept)
            how = f"It is quantize {as_options(option, names)}."
        return ParityError(
            f"{self._model}: no plan of {len(self._steps)} meets --budget {self._budget.text}. Nearest: {len(left)} of "
            f"{len(self._names)} sites in int8{share}, {self._budget.words(step.cost)}.",
            f"{how} Nothing was written; see --calibration and sensitivity.",
        )


def _words(count: int) -> str:
    return f"the {count} worst sites in float" if count > 1 else "the worst site in float"
