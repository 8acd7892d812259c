"""Costs of int8 site by site, and the search for the largest plan within a budget, as pure data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from scconv_deploy.records.codec import encode

SHOWN = 20
"""Sites that a table on a terminal, a picture and a printed list hold at most; JSON has all."""


@dataclass(frozen=True)
class Cost:
    """Cost of a plan on data, against the float model.

    Attributes:
        rows: number of rows of data.
        snr_db: signal-to-noise ratio of the outputs over all rows together, the worst output's; ``inf`` if nothing
            changed, ``-inf`` if an output is not finite any more.
        drop: accuracy lost, as a share of the labelled rows (negative: gained); None without labels.
        changed, answers: rows whose largest logit is another one, and rows compared; 0 of 0 without logits.
        gates_changed, gates: gates of SRUs that differ running free, and gates compared.
    """

    rows: int
    snr_db: float
    drop: float | None = None
    changed: int = 0
    answers: int = 0
    gates_changed: int = 0
    gates: int = 0

    @property
    def noise(self) -> float:
        """Power of the error over the power of the signal."""
        return 0.0 if self.snr_db == math.inf else math.inf if self.snr_db == -math.inf else 10 ** (-self.snr_db / 10)

    @property
    def answers_changed(self) -> float | None:
        """Share of the answers that changed; None without logits."""
        return self.changed / self.answers if self.answers else None


@dataclass(frozen=True)
class SiteCost:
    """Cost of one site when it alone is int8, and its shares.

    Attributes:
        site: name for ``--keep`` and ``--only``.
        kind: ``Conv`` or ``Gemm`` (input and weights), or ``Add`` (skip of a residual connection).
        cost: cost of this site alone.
        noise_share: its part of the sum of all sites' noise.
        multiply_adds_share: its part of the multiply-adds of all layers; None if a shape is not known.
        weight_bytes_share: its part of the bytes of all constants of the float file.
    """

    site: str
    kind: str
    cost: Cost
    noise_share: float
    multiply_adds_share: float | None
    weight_bytes_share: float


@dataclass(frozen=True)
class Sensitivity:
    """Costs of all sites of a plan, each alone in int8 and everything else in float.

    Attributes:
        model: name of the float file.
        data: source of the rows.
        method: how the ranges follow from the data.
        sites: by noise, the costliest first.
        together: cost of all of them.
        multiply_adds: of all layers for one row; None if a shape is not known.
        weight_bytes: bytes of all constants of the float file.
    """

    model: str
    data: str
    method: str
    sites: tuple[SiteCost, ...]
    together: Cost
    multiply_adds: int | None
    weight_bytes: int

    @property
    def in_float(self) -> tuple[float | None, float]:
        """Shares of multiply-adds and of weight bytes that no site has: what stays in float anyway."""
        parts = [one.multiply_adds_share for one in self.sites]
        adds = None if None in parts else 1 - math.fsum(part for part in parts if part is not None)
        return adds, 1 - math.fsum(one.weight_bytes_share for one in self.sites)

    def as_json(self) -> dict[str, Any]:
        """JSON values; the shares of what stays in float anyway make those of the sites complete."""
        adds, weights = self.in_float
        return {**encode(self), "in_float": {"multiply_adds_share": adds, "weight_bytes_share": weights}}


@dataclass(frozen=True)
class SearchStep:
    """A plan that the search measured as a whole.

    Attributes:
        plan: the plan in words.
        kept: number of sites left in float.
        multiply_adds_share: part of the multiply-adds in int8; None if a shape is not known.
        cost: cost of the plan on all of the data.
        within: whether it is within the budget.
    """

    plan: str
    kept: int
    multiply_adds_share: float | None
    cost: Cost
    within: bool


@dataclass(frozen=True)
class BudgetSearch:
    """Search for the largest int8 plan within a budget.

    Attributes:
        budget: the budget as it was given.
        sites: number of sites.
        keep: sites left in float by the plan that was found, in the graph's order.
        steps: plans that were measured, in order.
        result: index of the step that was taken.
        sensitivity: costs of the sites, which give the order; None if all sites together are within the budget.
    """

    budget: str
    sites: int
    keep: tuple[str, ...]
    steps: tuple[SearchStep, ...]
    result: int
    sensitivity: Sensitivity | None = None

    @property
    def found(self) -> SearchStep:
        """The step that was taken."""
        return self.steps[self.result]
