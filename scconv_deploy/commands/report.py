"""Commands of ``scconv-deploy report``: show, merge, check, diff, schema."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scconv_deploy.commands.options import Force, Json, Quiet
from scconv_deploy.commands.session import Session, run_session
from scconv_deploy.errors import ParityError, UsageError

if TYPE_CHECKING:
    from scconv_deploy.records.parity import ParityReport

reports = typer.Typer(help="Show, judge again and compare stored reports; nothing runs.")
Format = Literal["text", "markdown", "html", "junit", "json"]
Form = Annotated[Format | None, typer.Option("--format", help="Default: from the suffix of --output, else text.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="File to write instead of stdout.")]
Stored = Annotated[Path, typer.Argument(metavar="REPORT", help="A report.json, or a bundle.")]


@reports.command()
def show(
    report: Stored,
    form: Form = None,
    output: Output = None,
    force: Force = False,
) -> None:
    """Print a stored report, or write it in another format."""
    with run_session(form == "json", False) as session:
        from scconv_deploy.report.load import load_report

        _write(session, lambda: load_report(report), form, output, force)


@reports.command()
def merge(
    report: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or the report.json in it.")],
    device: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DEVICE]", help="device/ as finish wrote it, or its report.json; default: BUNDLE/device."
        ),
    ] = None,
    form: Form = None,
    output: Output = None,
    force: Force = False,
) -> None:
    """Merge a device's report into the bundle's: one report of the whole chain; exit 7 if it is of another bundle."""
    with run_session(form == "json", False) as session:
        from scconv_deploy.report.merge import merge_files

        _write(session, lambda: merge_files(report, device), form, output, force)


def _write(
    session: Session, get: Callable[[], ParityReport], form: Format | None, output: Path | None, force: bool
) -> None:
    """Print or write a report; the output file is checked before the report is read."""
    from scconv_deploy.report.render import format_of, render
    from scconv_deploy.report.text import print_report
    from scconv_deploy.system.atomic import check_output_file, write_file

    if output is not None:
        check_output_file(output, force)
        form = form or format_of(output)
    found = get()
    if output is not None:
        write_file(output, render(found, form or "text").encode())
    elif form in (None, "text"):
        session.show(found, print_report)
    else:
        session.write(render(found, form))


@reports.command()
def check(
    report: Stored,
    require: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LINK,...", help="Links that must have passed (engines: with gates compared); repeatable."
        ),
    ] = None,
    tolerance: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Judge by another limit; repeatable.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge a stored report again, also by other limits; exit 6 if a check fails or a required link has not passed."""
    from scconv_deploy.report.text import print_judgement

    with run_session(as_json, quiet) as session:
        from scconv_deploy.records.tolerances import parse_values
        from scconv_deploy.report.rejudge import check_report

        names = [name.strip() for text in require or () for name in text.split(",") if name.strip()]
        if require and not names:
            raise UsageError("--require names no link.", "Name one, for example --require onnxruntime.")
        result = check_report(report, names, parse_values(tolerance or ()))
        session.show(result, print_judgement)
        if not result:
            raise ParityError(f"{report}: {result.failures[0]}", "Do not sign it.")


@reports.command()
def diff(
    before: Annotated[Path, typer.Argument(metavar="A", help="A report.json, a bundle, or the folder of a run.")],
    after: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what changed between two reports, or two runs; always exit 0 (report check judges)."""
    from scconv_deploy.report.text import print_diff

    with run_session(as_json, quiet) as session:
        from scconv_deploy.report.diff import diff_reports
        from scconv_deploy.report.load import load_report
        from scconv_deploy.report.runs.diff import diff_runs
        from scconv_deploy.report.runs.load import is_run

        runs = [is_run(path) for path in (before, after)]
        if any(runs):
            if not all(runs):
                one, other = (before, after) if runs[0] else (after, before)
                raise UsageError(f"{one} is a run, and {other} is not.", "Name two runs, or a cell's bundle.")
            session.show(diff_runs(before, after), print_diff)
            return
        session.show(diff_reports(load_report(before), load_report(after)), print_diff)


@reports.command()
def schema() -> None:
    """Print the JSON Schema of report.json."""
    with run_session(False, False) as session:
        from scconv_deploy.report.schema import schema_text

        session.write(schema_text())
