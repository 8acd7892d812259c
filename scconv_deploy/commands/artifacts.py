"""The commands that take an ONNX file, and those that judge any artifact: parse and call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scconv_deploy.bundle.contents import ENGINE
from scconv_deploy.commands.engines import Plugin, verify_engine
from scconv_deploy.commands.options import (
    CheckOptions,
    Data,
    Digest,
    Force,
    Io,
    Json,
    Keep,
    MaskForm,
    ModelOptions,
    Quiet,
    Seed,
    grouped,
)
from scconv_deploy.commands.session import Session, command_line, run_session
from scconv_deploy.errors import UsageError
from scconv_deploy.report.verdict import parity_error

if TYPE_CHECKING:
    from scconv_deploy.records.parity import ParityReport


@grouped
def rewrite(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="An ONNX file from any exporter.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The ONNX file to write.")],
    expect: Annotated[
        int | None, typer.Option(min=0, help="Fail (exit 4) unless the result holds at least so many SRU nodes.")
    ] = None,
    mask_form: MaskForm = "auto",
    inline: Annotated[bool, typer.Option("--inline", help="Expand the functions.")] = False,
    adapted: Annotated[
        bool, typer.Option("--adapted", help="Also write FILE.plugin.onnx and FILE.inlined.onnx (TensorRT < 10.7).")
    ] = False,
    opset: Annotated[int | None, typer.Option(help="18 to 23; the file's own by default.")] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model it was exported from: judge parity against it.")
    ] = None,
    of_model: ModelOptions = ModelOptions(),
    data: Data = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give any exporter's ONNX file gates that compute what PyTorch's do, each SRU as one node."""
    from scconv_deploy.commands.printing import print_rewrite

    with run_session(as_json, quiet) as session:
        from scconv_deploy.workflows.rewrite import RewriteOptions, rewrite_onnx

        if reference is None and of_model.given:
            raise UsageError(f"These options belong to a model: {of_model.given}.", "Name it with --reference MODEL.")

        result = rewrite_onnx(
            source,
            output,
            options=RewriteOptions(opset, mask_form, inline, adapted, expect, of_model.seed),
            reference=None if reference is None else of_model.spec(reference),
            data=data,
            force=force,
            command=command_line(),
            progress=session.progress,
        )
        session.show(result, print_rewrite)
        if result.parity is not None and not result.parity:
            raise parity_error(result.path, result.parity, "Do not ship it.")


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="A float32 ONNX file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The ONNX file to write.")],
    precision: Annotated[Literal["fp16", "bf16"], typer.Option(help="Of the data; gates stay in float32.")],
    io: Io = "float32",
    keep: Keep = None,
    data: Annotated[str | None, typer.Option(metavar="FILE.npz", help="Real inputs instead of seeded noise.")] = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Convert to half precision, the gates in float32; exit 6 (nothing written) if a gate changes on the same input."""
    from scconv_deploy.commands.printing import print_conversion

    with run_session(as_json, quiet) as session:
        from scconv_deploy.precision.half import HalfOptions
        from scconv_deploy.workflows.convert import convert_onnx

        options = HalfOptions(precision, io, tuple(keep or ()))
        result = convert_onnx(
            source, output, options,
            data=data, seed=seed, force=force, command=command_line(), progress=session.progress,
        )  # fmt: skip
        session.show(result, print_conversion)


@grouped
def verify(
    artifact: Annotated[Path, typer.Argument(help="An ONNX file, a bundle, or an engine (on its GPU).")],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model it came from, or an ONNX file; a bundle brings its own. For an engine also a bundle.",
        ),
    ] = None,
    of_model: ModelOptions = ModelOptions(),
    judged: CheckOptions = CheckOptions(),
    digest: Digest = "",
    plugin: Plugin = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Also write the report; .json, .html, .md or .xml (JUnit)."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge an artifact against PyTorch: exit 0 if it computes the same, 6 if it does not."""
    from scconv_deploy.report.text import print_report

    with run_session(as_json, quiet) as session:
        from scconv_deploy.bundle.manifest import check_digest
        from scconv_deploy.report.render import format_of, render
        from scconv_deploy.system.atomic import check_output_file, write_file

        if digest:
            check_digest(artifact, digest)
        if report is not None:
            form = format_of(report)
            check_output_file(report, force)
        result = _judge(artifact, reference, of_model, judged, plugin, session)
        if report is not None:
            write_file(report, render(result, form).encode())
        session.show(result, print_report)
        if not result:
            raise parity_error(artifact, result, "Do not ship it.")


def _judge(
    artifact: Path,
    reference: str | None,
    of_model: ModelOptions,
    judged: CheckOptions,
    plugin: Path | None,
    session: Session,
) -> ParityReport:
    """Judge by the kinds of artifact and reference; refuse options that mean nothing to these."""
    if artifact.name.endswith(ENGINE):
        return verify_engine(artifact, plugin, of_model.spec(reference or ""), judged.checks(), session)
    if plugin is not None:
        raise UsageError("--plugin belongs to an engine.", "Leave it out.")
    names = ", ".join(filter(None, (of_model.given, judged.of_model)))
    if reference is None:
        names = ", ".join(filter(None, (names, "--seed" if of_model.seed else "")))
        if names:
            raise UsageError(f"These options belong to a model: {names}.", "Name it with --reference MODEL.")
        return _verify_bundle(artifact, judged, session)
    if reference.endswith(".onnx"):
        if names:
            why = f"These options belong to a model, and the reference is an ONNX file: {names}."
            raise UsageError(why, "Leave them out.")
        from scconv_deploy.workflows.verify import verify_against_onnx

        return verify_against_onnx(
            artifact, Path(reference), seed=of_model.seed, judging=judged.judging(), command=command_line()
        )
    from scconv_deploy.workflows.verify import verify_spec

    return verify_spec(
        artifact, of_model.spec(reference), checks=judged.checks(), command=command_line(), progress=session.progress
    )


def _verify_bundle(artifact: Path, judged: CheckOptions, session: Session) -> ParityReport:
    """Verify a bundle without a model and without torch."""
    from scconv_deploy.workflows.verify import verify_bundle

    if not artifact.exists():
        raise UsageError(f"{artifact} does not exist.", "Check the path.")
    if not artifact.is_dir():
        raise UsageError(f"{artifact} is not a bundle, so nothing says what it must compute.", "Add --reference MODEL.")
    return verify_bundle(artifact, judging=judged.judging(), command=command_line(), progress=session.progress)
