"""The command line: parse, call, print, exit code. No logic lives here, and torch is imported by the commands."""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
import typer.core

from scconv_deploy import __version__, cli_build, cli_plugin, cli_report
from scconv_deploy.cli_options import (
    Batch,
    Data,
    Deep,
    Digest,
    Dynamic,
    Embed,
    Force,
    Inputs,
    Io,
    Json,
    Keep,
    Kwargs,
    MaskForm,
    Model,
    NonStrict,
    Opset,
    Precision,
    Preprocess,
    Provider,
    Quiet,
    Seed,
    Tolerances,
    Trust,
    Weights,
)
from scconv_deploy.cli_session import Session, command_line, report_error, run_session
from scconv_deploy.errors import MissingRuntimeError, ParityError, UsageError

if TYPE_CHECKING:
    from scconv_deploy.report.records import ParityReport
    from scconv_deploy.spec import ModelSpec
    from scconv_deploy.verification.chain import Judging
    from scconv_deploy.verification.checks import Checks

_UsageError: Any = typer.BadParameter.__bases__[0]  # typer's own, which it does not export


class _Group(typer.core.TyperGroup):
    """Reports a command line that cannot be parsed like every other error: one line, or one JSON document."""

    def main(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Any:
        args = list(sys.argv[1:] if args is None else args) or ["--help"]
        try:
            code = super().main(args, *rest, **options | {"standalone_mode": False})
        except _UsageError as error:
            see = f"See {error.ctx.command_path if error.ctx else 'scconv-deploy'} --help."
            code = report_error(2, error.format_message(), see, as_json="--json" in args)
        except typer.Abort:
            code = report_error(130, "Interrupted.", "", as_json="--json" in args)
        sys.exit(code or 0)


app = typer.Typer(
    name="scconv-deploy",
    cls=_Group,
    pretty_exceptions_enable=False,
    help="Take PyTorch models with ScConv in them to ONNX, and prove that the artifact computes what PyTorch computes.",
    epilog="Exit codes: 0 done, 1 internal, 2 usage, 3 environment, 4 model or graph, 5 build, 6 parity failed, "
    "7 a file that is not what it claims, 130 interrupted.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """The options that need no command."""


@app.command()
def deploy(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The bundle's folder.")],
    kwargs: Kwargs = None,
    weights: Weights = None,
    non_strict: NonStrict = False,
    trust_checkpoint: Trust = False,
    inputs: Inputs = None,
    batch: Batch = None,
    dynamic: Dynamic = None,
    seed: Seed = 0,
    embed: Embed = None,
    data: Data = None,
    deep: Deep = None,
    preprocessing: Preprocess = None,
    tolerance: Tolerances = None,
    provider: Provider = "cpu",
    opset: Opset = None,
    mask_form: MaskForm = "auto",
    precision: Precision = "fp32",
    io: Io = "float32",
    keep: Keep = None,
    backend: cli_build.Backends = None,
    target: cli_build.Target = "",
    cache: cli_build.CacheFolder = None,
    no_cache: cli_build.NoCache = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a model, verify the artifact against PyTorch, build engines if asked, and write a bundle."""
    with run_session(as_json, quiet) as session:
        from scconv_deploy.exporting import ExportOptions
        from scconv_deploy.pipeline import deploy_spec

        spec = _spec(model, kwargs, weights, non_strict, trust_checkpoint, inputs, batch, dynamic, seed, embed)
        backends = cli_build.parse_backends(backend)
        result = deploy_spec(
            spec,
            output,
            ExportOptions(opset, mask_form, backends, precision, io, tuple(keep or ())),
            engines=cli_build.engine_request(backends, target, spec.dynamic),
            cache=cli_build.chosen_cache(cache, no_cache),
            checks=_checks(data, deep, preprocessing, tolerance, provider),
            force=force,
            command=command_line(),
            progress=session.progress,
        )
        session.show(result, "print_deploy")
        if not result:
            raise ParityError(f"{result.artifact}: {result.report.failures[0]}", "Do not ship it; see report.json.")


@app.command()
def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The ONNX file.")],
    kwargs: Kwargs = None,
    weights: Weights = None,
    non_strict: NonStrict = False,
    trust_checkpoint: Trust = False,
    inputs: Inputs = None,
    batch: Batch = None,
    dynamic: Dynamic = None,
    seed: Seed = 0,
    embed: Embed = None,
    opset: Opset = None,
    mask_form: MaskForm = "auto",
    precision: Precision = "fp32",
    io: Io = "float32",
    keep: Keep = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a model to ONNX, each SRU as one node; nothing is verified."""
    with run_session(as_json, quiet) as session:
        from scconv_deploy.exporting import ExportOptions, export_spec

        spec = _spec(model, kwargs, weights, non_strict, trust_checkpoint, inputs, batch, dynamic, seed, embed)
        options = ExportOptions(opset, mask_form, precision=precision, io=io, keep=tuple(keep or ()))
        result = export_spec(spec, output, options, force, session.progress)
        session.show(result, "print_export")


@app.command()
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
    kwargs: Kwargs = None,
    weights: Weights = None,
    non_strict: NonStrict = False,
    trust_checkpoint: Trust = False,
    inputs: Inputs = None,
    batch: Batch = None,
    dynamic: Dynamic = None,
    seed: Seed = 0,
    embed: Embed = None,
    data: Data = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Give any exporter's ONNX file gates that compute what PyTorch's do, each SRU as one node."""
    with run_session(as_json, quiet) as session:
        from scconv_deploy.rewriting import RewriteOptions, rewrite_onnx

        spec = None
        if reference is not None:
            spec = _spec(reference, kwargs, weights, non_strict, trust_checkpoint, inputs, batch, dynamic, seed, embed)
        result = rewrite_onnx(
            source,
            output,
            options=RewriteOptions(opset, mask_form, inline, adapted, expect, seed),
            reference=spec,
            data=data,
            force=force,
            command=command_line(),
            progress=session.progress,
        )
        session.show(result, "print_rewrite")
        if result.parity is not None and not result.parity:
            raise ParityError(f"{result.path}: {result.parity.failures[0]}", "Do not ship it.")


@app.command()
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
    with run_session(as_json, quiet) as session:
        from scconv_deploy.converting import convert_onnx
        from scconv_deploy.precision.half import HalfOptions

        options = HalfOptions(precision, io, tuple(keep or ()))
        result = convert_onnx(
            source, output, options,
            data=data, seed=seed, force=force, command=command_line(), progress=session.progress,
        )  # fmt: skip
        session.show(result, "print_conversion")


@app.command()
def verify(
    artifact: Annotated[Path, typer.Argument(help="An ONNX file, a bundle, or an engine (on its GPU).")],
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The model it came from, or an ONNX file; a bundle brings its own. For an engine also a bundle.",
        ),
    ] = None,
    kwargs: Kwargs = None,
    weights: Weights = None,
    non_strict: NonStrict = False,
    trust_checkpoint: Trust = False,
    inputs: Inputs = None,
    batch: Batch = None,
    dynamic: Dynamic = None,
    seed: Seed = 0,
    embed: Embed = None,
    data: Data = None,
    deep: Deep = None,
    preprocessing: Preprocess = None,
    tolerance: Tolerances = None,
    provider: Provider = "cpu",
    digest: Digest = "",
    plugin: cli_build.Plugin = None,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", help="Also write the report; .json, .html, .md or .xml (JUnit)."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Judge an artifact against PyTorch: exit 0 if it computes the same, 6 if it does not."""
    with run_session(as_json, quiet) as session:
        from scconv_deploy.bundle.atomic import check_output_file, write_file
        from scconv_deploy.bundle.manifest import check_digest
        from scconv_deploy.report.render import format_of, render

        if digest:
            check_digest(artifact, digest)
        if report is not None:
            form = format_of(report)
            check_output_file(report, force)
        of_model = deep is not None or any(
            (kwargs, weights, non_strict, trust_checkpoint, inputs, batch, dynamic, embed, data, preprocessing)
        )
        engine = artifact.name.endswith((".engine", ".engine.rejected"))
        if plugin is not None and not engine:
            raise UsageError("--plugin belongs to an engine.", "Leave it out.")
        if engine:
            spec = _spec(
                reference or "", kwargs, weights, non_strict, trust_checkpoint, inputs, batch, dynamic, seed, embed
            )
            checks = _checks(data, deep, preprocessing, tolerance, provider)
            result = cli_build.verify_engine(artifact, plugin, spec, checks, session)
        elif reference is None:
            if of_model or seed:
                raise UsageError("These options belong to a model.", "Name it with --reference MODEL.")
            result = _verify_bundle(artifact, tolerance, provider, session)
        elif reference.endswith(".onnx"):
            if of_model:
                raise UsageError("These options belong to a model; the reference is an ONNX file.", "Leave them out.")
            from scconv_deploy.verification.onnx_reference_file import verify_against_onnx

            judging = _judging(tolerance, provider)
            result = verify_against_onnx(artifact, Path(reference), seed=seed, judging=judging, command=command_line())
        else:
            from scconv_deploy.pipeline import verify_spec

            spec = _spec(reference, kwargs, weights, non_strict, trust_checkpoint, inputs, batch, dynamic, seed, embed)
            checks = _checks(data, deep, preprocessing, tolerance, provider)
            result = verify_spec(artifact, spec, checks=checks, command=command_line(), progress=session.progress)
        if report is not None:
            write_file(report, render(result, form).encode())
        session.show(result, "print_report")
        if not result:
            raise ParityError(f"{artifact}: {result.failures[0]}", "Do not ship it.")


@app.command()
def inspect(
    target: Annotated[str, typer.Argument(metavar="MODEL|ARTIFACT", help="A model, an ONNX file, or a bundle.")],
    kwargs: Kwargs = None,
    weights: Weights = None,
    non_strict: NonStrict = False,
    trust_checkpoint: Trust = False,
    inputs: Inputs = None,
    batch: Batch = None,
    dynamic: Dynamic = None,
    seed: Seed = 0,
    embed: Embed = None,
    data: Data = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a model or an artifact holds."""
    with run_session(as_json, quiet) as session:
        from scconv_deploy.inspection import inspect_engine, inspect_model, inspect_onnx

        if target.endswith((".onnx", ".rejected", ".engine")) or Path(target).is_dir():
            if kwargs or weights or inputs or batch or dynamic or data:
                raise UsageError(f"{target} is an artifact; options of a model mean nothing to it.", "Leave them out.")
            if target.endswith(".engine"):
                session.show(inspect_engine(Path(target)), "print_engine")
            else:
                session.show(inspect_onnx(Path(target)), "print_onnx")
        else:
            spec = _spec(target, kwargs, weights, non_strict, trust_checkpoint, inputs, batch, dynamic, seed, embed)
            session.show(inspect_model(spec, data, session.progress), "print_model")


@app.command()
def doctor(
    require: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Exit 3 if this is missing, for example nvcc; repeatable."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what this machine can do, what is missing and how to get it; exit 3 if something required is missing."""
    with run_session(as_json, quiet) as session:
        from scconv_deploy.doctor import diagnose

        session.progress("looking at runtimes, GPUs and compilers")
        result = diagnose()
        session.show(result, "print_diagnosis")
        lacking = result.lacking(require or ())
        if lacking:
            first = lacking[0]
            raise MissingRuntimeError(f"{first.name}: {first.found}.", first.remedy)


@app.command()
def models(
    table: Annotated[
        Path | None, typer.Option("--table", metavar="FILE", help="Also write the counts beside the paper's, Markdown.")
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the zoo: parameters, multiply-adds, default input, source."""
    with run_session(as_json, quiet) as session:
        from scconv_deploy.bundle.atomic import check_output_file, write_file
        from scconv_deploy.zoo.catalogue import document, list_models

        if table is not None:
            check_output_file(table, force)
        listing = list_models(progress=session.progress)
        if table is not None:
            write_file(table, document(listing).encode())
        session.show(listing, "print_models")


def _verify_bundle(artifact: Path, tolerance: list[str] | None, provider: str, session: Session) -> ParityReport:
    """Without a model, and without torch."""
    from scconv_deploy.verification.recorded import verify_bundle

    if not artifact.is_dir():
        raise UsageError(f"{artifact} is not a bundle, so nothing says what it must compute.", "Add --reference MODEL.")
    return verify_bundle(
        artifact, judging=_judging(tolerance, provider), command=command_line(), progress=session.progress
    )


def _judging(tolerance: list[str] | None, provider: str) -> Judging:
    from scconv_deploy.verification.chain import Judging
    from scconv_deploy.verification.runners.onnxruntime import RuntimeOptions
    from scconv_deploy.verification.tolerances import parse_overrides

    return Judging(parse_overrides(tolerance or ()), RuntimeOptions(provider))


def _checks(
    data: str | None, deep: int | None, preprocessing: str | None, tolerance: list[str] | None, provider: str
) -> Checks:
    from scconv_deploy.verification.checks import DEEP, Checks
    from scconv_deploy.verification.samples import Preprocessing
    from scconv_deploy.verification.tolerances import parse_overrides

    wanted = None if preprocessing is None else Preprocessing.parse(preprocessing)
    return Checks(data, wanted, parse_overrides(tolerance or ()), provider, DEEP if deep is None else deep)


def _spec(
    source: str,
    kwargs: str | None,
    weights: Path | None,
    non_strict: bool,
    trust_checkpoint: bool,
    inputs: list[str] | None,
    batch: str | None,
    dynamic: list[str] | None,
    seed: int,
    embed: str | None,
) -> ModelSpec:
    from scconv_deploy.spec import DynamicAxis, EmbedSpec, InputSpec, ModelSpec, parse_kwargs

    axes = [] if batch is None else [DynamicAxis.parse_batch(batch)]
    return ModelSpec(
        source,
        parse_kwargs(kwargs),
        weights,
        tuple(InputSpec.parse(text) for text in inputs or ()),
        (*axes, *(DynamicAxis.parse(text) for text in dynamic or ())),
        seed,
        not non_strict,
        trust_checkpoint,
        None if embed is None else EmbedSpec.parse(embed),
    )


cli_build.register(app)
app.add_typer(cli_plugin.plugin, name="plugin")
app.add_typer(cli_report.reports, name="report")


def _interrupt(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, _interrupt)  # so that temporary files are removed
    try:
        app()
    finally:  # what was decided stays, whatever arrives while the interpreter shuts down
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
