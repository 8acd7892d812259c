"""Costs of int8 sites and searched plans: tables for a terminal, lines for a stage record."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from scconv_deploy.records.sensitivity import SHOWN, BudgetSearch, Cost, Sensitivity
from scconv_deploy.records.stage import StageRecord
from scconv_deploy.report.tables import print_line, table_of


def print_sensitivity(console: Console, result: Sensitivity) -> None:
    """Print the costliest sites, the rest in one row, all sites together, and what stays in float anyway."""
    cost = result.together
    table = table_of(
        f"Each site alone in int8, everything else in float: {cost.rows:,} rows of {result.data}",
        "site", "kind", "SNR dB", "noise", "accuracy lost", "answers changed", "gates changed", "multiply-adds",
        "weights",
    )  # fmt: skip
    for one in result.sites[:SHOWN]:
        table.add_row(
            Text(one.site), one.kind, *_cells(one.cost, f"{one.noise_share:.1%}"), percent(one.multiply_adds_share),
            percent(one.weight_bytes_share),
        )  # fmt: skip
    if rest := result.sites[SHOWN:]:
        adds = [one.multiply_adds_share for one in rest]
        table.add_row(
            f"{len(rest)} more", "", "", f"{sum(one.noise_share for one in rest):.1%}", "", "", "",
            percent(None if None in adds else sum(part for part in adds if part is not None)),
            percent(sum(one.weight_bytes_share for one in rest)),
        )  # fmt: skip
    adds_in_float, weights_in_float = result.in_float
    table.add_row("in float anyway", "", "", "", "", "", "", percent(adds_in_float), percent(weights_in_float))
    table.add_row("all sites together", "", *_cells(cost, ""), "", "")
    console.print(table)
    print_line(console, f"scales   {result.method} of {cost.rows:,} rows of {result.data}")
    print_line(console, "leave sites in float with --keep NAME, or let quantize --budget choose them")


def print_searches(console: Console, stages: Iterable[StageRecord]) -> None:
    """Print the searches of these stages."""
    for stage in stages:
        if stage.search is not None:
            print_search(console, stage.search)


def print_search(console: Console, search: BudgetSearch) -> None:
    """Print the plans that a search measured, and the options that repeat its result."""
    table = table_of(
        f"Plans within the budget {search.budget}", "plan", "in float", "multiply-adds", "SNR dB", "accuracy lost",
        "answers changed", "gates changed", "",
    )  # fmt: skip
    for number, step in enumerate(search.steps):
        snr, _, *others = _cells(step.cost, "")
        verdict = "taken" if number == search.result else "within" if step.within else "beyond"
        table.add_row(
            Text(step.plan), f"{step.kept} of {search.sites}", percent(step.multiply_adds_share), snr, *others, verdict
        )
    console.print(table)
    print_line(console, f"the same without a search: {repeated(search)}")


def repeated(search: BudgetSearch) -> str:
    """Options that repeat the plan of a search, beside those that were given."""
    return as_options("--keep", search.keep) or "leave --budget out"


def search_lines(search: BudgetSearch) -> list[str]:
    """Lines of a stage record: the plans that were measured, and the options that repeat the one that was taken."""
    lines = [
        f"budget {search.budget}: {step.plan}, {percent(step.multiply_adds_share)} of the multiply-adds in int8: "
        f"{cost_words(step.cost)}; {'within' if step.within else 'beyond'}"
        for step in search.steps
    ]
    return [
        *lines,
        f"budget {search.budget}: taken is {search.found.plan}; the same without a search: {repeated(search)}",
    ]


def as_options(option: str, names: Sequence[str]) -> str:
    """Names as options of a command line, quoted for a shell."""
    return " ".join(f"{option} {shlex.quote(name)}" for name in names)


def cost_words(cost: Cost) -> str:
    """Cost in one line."""
    words = [] if cost.drop is None else [f"accuracy falls by {cost.drop:.2%}"]
    words.append(f"SNR {decibels(cost.snr_db)} dB")
    if cost.answers:
        words.append(f"{cost.changed:,} of {cost.answers:,} answers changed")
    if cost.gates:
        words.append(f"{cost.gates_changed / cost.gates:.2%} of gates changed")
    return ", ".join(words)


def decibels(snr_db: float) -> str:
    """Signal-to-noise ratio with one digit; ``exact`` where nothing changed."""
    return "exact" if snr_db == float("inf") else "not finite" if snr_db == float("-inf") else f"{snr_db:.1f}"


def percent(share: float | None) -> str:
    """Share in percent with one digit, ``-`` if it is not known."""
    return "-" if share is None else f"{max(share, 0.0):.1%}"


def _cells(cost: Cost, noise: str) -> tuple[str, ...]:
    return (
        decibels(cost.snr_db),
        noise,
        "-" if cost.drop is None else f"{cost.drop:.2%}",
        f"{cost.changed:,} of {cost.answers:,}" if cost.answers else "-",
        f"{cost.gates_changed / cost.gates:.2%}" if cost.gates else "-",
    )
