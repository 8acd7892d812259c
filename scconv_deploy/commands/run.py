"""The command ``run``: every model of a run file in every variant."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scconv_deploy.commands.models import Deployment, deploy
from scconv_deploy.commands.options import Json, Quiet, grouped, regrouped
from scconv_deploy.commands.session import run_session
from scconv_deploy.commands.workers import WorkerOptions
from scconv_deploy.records.stage import Progress

if TYPE_CHECKING:
    from rich.console import Console

    from scconv_deploy.workers.tasks import Workers
    from scconv_deploy.workflows.run import Plan, RunResult


@grouped
def run(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="The run file.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and do nothing.")] = False,
    processes: WorkerOptions = WorkerOptions(),
    bench: Annotated[
        bool, typer.Option("--bench", help="Then time the ONNX files in ONNX Runtime, for the overview.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Make every cell again, changed or not.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Deploy every model of a run file in every variant; what did not change is not done again."""
    with run_session(as_json, quiet) as session:
        from scconv_deploy.commands.run_file import read_run_file
        from scconv_deploy.workflows.run import PRELOAD, CellsFailedError, plan_run, run_cells

        found = read_run_file(file)
        plan = plan_run(found.cells, found.output, force)
        if dry_run:
            session.show(plan, print_plan)
            return
        chosen = WorkerOptions(
            processes.engine or found.engine, processes.address or found.address, processes.jobs or found.jobs
        )
        result = run_cells(plan, deploy_cell, lambda: chosen.workers(PRELOAD), session.progress, bench or found.bench)
        session.show(result, print_run)
        if not result:
            raise CellsFailedError(result)


def deploy_cell(
    arguments: Sequence[str], folder: Path, command: str, progress: Progress, workers: Workers | None
) -> None:
    """Write a cell's bundle, parsed as the command line parses it; runs in a process of its own."""
    given: dict[str, Any] = {}

    def capture(**values: Any) -> None:
        given.update(values)

    capture.__signature__ = inspect.signature(deploy)  # type: ignore[attr-defined]
    app = typer.Typer()
    app.command()(capture)
    app([*arguments, f"--output={folder}"], standalone_mode=False)
    for name in ("as_json", "quiet"):
        del given[name]
    Deployment(**regrouped(deploy.__wrapped__, given)).run(command, progress, workers)  # type: ignore[attr-defined]


def print_plan(console: Console, plan: Plan) -> None:
    """Print the command of each cell, after its name; an unchanged one says so."""
    from scconv_deploy.report.tables import print_line

    for one in plan.planned:
        text = "unchanged" if one.kept is not None else one.cell.command(plan.output)
        print_line(console, f"{one.cell.name}: {text}")


def print_run(console: Console, result: RunResult) -> None:
    """Print a row for each cell, and where the overview is."""
    from rich.text import Text

    from scconv_deploy.report.runs.facts import COLUMNS, facts_of, headline
    from scconv_deploy.report.runs.render import OVERVIEW
    from scconv_deploy.report.tables import print_line, styled_status, table_of

    table = table_of("Cells", *COLUMNS)
    for cell in result.record.cells:
        facts = (Text(text) for text in facts_of(cell).values())
        table.add_row(Text(cell.name), styled_status(cell.status), *facts, Text(cell.message))
    console.print(table)
    print_line(console, headline(result.record))
    print_line(console, f"overview {result.output / OVERVIEW}")
