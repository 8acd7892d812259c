"""Tables and lines for a terminal, without markup or wrapping, so that paths can be copied."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from scconv_deploy.records.stage import StageRecord

if TYPE_CHECKING:  # not at run time: these modules import torch
    pass


_STYLES = {
    "passed": "green", "failed": "bold red", "not run": "yellow",
    "not judged": "yellow", "not done": "yellow", "error": "bold red",
    "ok": "green", "missing": "yellow", "warning": "bold yellow",
}  # fmt: skip


def table_of(title: str, *columns: str) -> Table:
    """Make an empty table without rules; long cells fold."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def styled_status(status: str) -> Text:
    """Status in its colour."""
    return Text(status, style=_STYLES[status])


def print_line(console: Console, text: str) -> None:
    """Print plain text, without markup, highlighting or wrapping."""
    console.print(Text(text), soft_wrap=True)


def print_embedding(console: Console, stages: Iterable[StageRecord]) -> None:
    """Print the convolutions that ``--embed`` replaced, and those that it left, by reason."""
    for stage in stages:
        if stage.name != "embed":
            continue
        for line in stage.applied:
            print_line(console, f"embed    {line}")
        reasons: dict[str, list[str]] = {}
        for path, reason in stage.skipped:
            reasons.setdefault(reason, []).append(path)
        for reason, paths in reasons.items():
            print_line(console, f"left     {', '.join(paths)}: {reason}")


def print_left_alone(console: Console, pairs: Iterable[tuple[str, str]]) -> None:
    """Print the modules or nodes that were left alone, with the reason."""
    for path, reason in pairs:
        print_line(console, f"left alone: {path}: {reason}")
