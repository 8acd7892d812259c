"""Commands that take an ONNX file or judge any artifact: rewrite, convert, quantize, sensitivity,
verify."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scconv_deploy.commands.calibrating import CodesTarget, Int8Options, ReduceRange, SiteOptions
from scconv_deploy.commands.engines import Plugin
from scconv_deploy.commands.options import (
    CheckOptions,
    Cru,
    Data,
    Digest,
    Force,
    Io,
    Json,
    Keep,
    MaskForm,
    ModelOptions,
    Preprocess,
    Quiet,
    Seed,
    grouped,
)
from scconv_deploy.commands.session import Session, command_line, run_session
from scconv_deploy.commands.workers import WorkerOptions
from scconv_deploy.errors import UsageError
from scconv_deploy.report.verdict import parity_error

Report = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE", help="Also write the report; .json, .html, .md or .xml (JUnit)."),
]

if TYPE_CHECKING:
    from scconv_deploy.model.spec import ModelSpec
    from scconv_deploy.records.parity import ParityReport
    from scconv_deploy.workflows.subject import Bundle, Engine, OnnxFile


@grouped
def rewrite(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="An ONNX file from any exporter.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The ONNX file to write.")],
    expect: Annotated[
        int | None,
        typer.Option(min=0, help="Fail (exit 4) if the result holds fewer SRU nodes; default: 1, or another gate."),
    ] = None,
    mask_form: MaskForm = "auto",
    cru: Cru = "auto",
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
    """Rewrite any exporter's ONNX file so that its gates are PyTorch's, each SRU as one node."""
    from scconv_deploy.commands.printing import print_rewrite

    with run_session(as_json, quiet) as session:
        from scconv_deploy.workflows.rewrite import RewriteOptions, rewrite_onnx

        if reference is None and of_model.given:
            raise UsageError(
                f"These options belong to a model: {', '.join(of_model.given)}.", "Name it with --reference MODEL."
            )

        result = rewrite_onnx(
            source,
            output,
            options=RewriteOptions(opset, mask_form, inline, adapted, expect, of_model.seed, cru),
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
def quantize(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="A float ONNX file; rewrite it first.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The ONNX file to write.")],
    int8: Int8Options = Int8Options(),
    keep: Keep = None,
    target: CodesTarget = "gpu",
    reduce_range: ReduceRange = False,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model it was exported from: prove the file against it.")
    ] = None,
    of_model: ModelOptions = ModelOptions(),
    judged: CheckOptions = CheckOptions(),
    report: Report = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantise to int8, the gates in float32; exit 6 (nothing written) if the proof fails or the budget is exceeded."""
    from scconv_deploy.commands.printing import print_quantization

    with run_session(as_json, quiet) as session:
        from scconv_deploy.workflows.quantize import quantize_onnx

        if reference is None and (names := of_model.given):
            raise UsageError(f"These options belong to a model: {', '.join(names)}.", "Name it with --reference MODEL.")
        result = quantize_onnx(
            source, output,
            int8.options(judged.data, judged.preprocessing, of_model.seed, tuple(keep or ()), target,
                         reduce_range=reduce_range),
            reference=None if reference is None else of_model.spec(reference),
            checks=int8.checks(judged), report=report,
            force=force, command=command_line(), progress=session.progress,
        )  # fmt: skip
        session.show(result, print_quantization)


@grouped
def sensitivity(
    source: Annotated[Path, typer.Argument(metavar="IN.onnx", help="A float ONNX file; rewrite it first.")],
    sites: SiteOptions = SiteOptions(),
    keep: Keep = None,
    target: CodesTarget = "gpu",
    reduce_range: ReduceRange = False,
    data: Data = None,
    preprocessing: Preprocess = None,
    seed: Seed = 0,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Also write the costs; .json or .html.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what each layer costs when it alone is int8, and its share of the work; the costliest first."""
    from scconv_deploy.report.sensitivity import print_sensitivity

    with run_session(as_json, quiet) as session:
        from scconv_deploy.report.render import render_sensitivity, sensitivity_format
        from scconv_deploy.system.atomic import check_output_file, write_file
        from scconv_deploy.workflows.sensitivity import sensitivity_onnx

        if report is not None:
            form = sensitivity_format(report)
            check_output_file(report, force)
        result = sensitivity_onnx(
            source, sites.calibrating(data, preprocessing, seed), sites.placement(keep),
            target=target, reduce_range=reduce_range, progress=session.progress,
        )  # fmt: skip
        if report is not None:
            write_file(report, render_sensitivity(result, form).encode())
        session.show(result, print_sensitivity)


@grouped
def verify(
    artifact: Annotated[Path, typer.Argument(help="An ONNX file, a bundle, or an engine (on its GPU).")],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model it came from, or an ONNX file; a bundle has its own. For an engine also a bundle.",
        ),
    ] = None,
    of_model: ModelOptions = ModelOptions(),
    judged: CheckOptions = CheckOptions(),
    digest: Digest = "",
    plugin: Plugin = None,
    processes: WorkerOptions = WorkerOptions(),
    report: Report = None,
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
        result = _judge(artifact, reference, of_model, judged, plugin, processes, session)
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
    processes: WorkerOptions,
    session: Session,
) -> ParityReport:
    from scconv_deploy.workflows.subject import Engine, artifact_of
    from scconv_deploy.workflows.verify import verify_subject

    subject = artifact_of(artifact)
    if plugin is not None and not isinstance(subject, Engine):
        raise UsageError("--plugin belongs to an engine.", "Leave it out.")
    against = _reference(subject, reference, of_model, judged)
    if processes.given and (judged.data is None or isinstance(subject, Engine)):
        raise UsageError(
            f"{processes.given[0]} shares out the rows of --data for an ONNX file, and there are none.", "Leave it out."
        )
    checks = judged.checks()
    if processes.given:
        checks = replace(checks, workers=processes.workers(["scconv_deploy.verification.onnx.shards"]))
    return verify_subject(subject, against, checks, plugin=plugin, command=command_line(), progress=session.progress)


def _reference(
    artifact: OnnxFile | Engine | Bundle, reference: str | None, of_model: ModelOptions, judged: CheckOptions
) -> ModelSpec | OnnxFile | Bundle:
    """Reference of an artifact; refuse options that the reference does not use (UsageError)."""
    from scconv_deploy.workflows.subject import Bundle, Engine, OnnxFile, subject_of

    if reference is None:
        return _own_reference(artifact, of_model, judged)
    named = subject_of(reference)
    if isinstance(named, OnnxFile) and not named.rejected:
        kind = "an ONNX file"
    elif isinstance(named, Bundle) and isinstance(artifact, Engine):
        kind = "a bundle"
    else:
        return of_model.spec(reference)
    if names := ", ".join((*of_model.given, *judged.of_model)):
        why = f"These options belong to a model, and the reference is {kind}: {names}."
        raise UsageError(why, "Leave them out.")
    if isinstance(named, OnnxFile):
        return replace(named, seed=of_model.seed)
    if of_model.seed or judged.provider.lower() not in ("cpu", "cpuexecutionprovider", "cpu+fused"):
        raise UsageError(f"--seed and --provider mean nothing to a bundle ({reference}).", "Leave them out.")
    return named


def _own_reference(artifact: OnnxFile | Engine | Bundle, of_model: ModelOptions, judged: CheckOptions) -> Bundle:
    """A bundle as its own reference; other artifacts need ``--reference`` (UsageError)."""
    from scconv_deploy.workflows.subject import Bundle, Engine

    if isinstance(artifact, Engine):
        raise UsageError(
            f"{artifact.path} is an engine, so nothing says what it must compute.", "Add --reference MODEL or BUNDLE."
        )
    if names := ", ".join((*of_model.given, *judged.of_model, *(("--seed",) if of_model.seed else ()))):
        raise UsageError(f"These options belong to a model: {names}.", "Name it with --reference MODEL.")
    if not artifact.path.exists():
        raise UsageError(f"{artifact.path} does not exist.", "Check the path.")
    if not isinstance(artifact, Bundle):
        raise UsageError(
            f"{artifact.path} is not a bundle, so nothing says what it must compute.", "Add --reference MODEL."
        )
    return artifact
