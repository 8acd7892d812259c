"""Commands that take a MODEL (deploy, export, inspect), and the list of the zoo."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scconv_deploy.commands.calibrating import Int8Options
from scconv_deploy.commands.engines import EngineOptions, Plugin, chosen_cache, engine_request, parse_backends
from scconv_deploy.commands.options import (
    CheckOptions,
    Data,
    Force,
    GraphOptions,
    Json,
    Model,
    ModelOptions,
    Preprocess,
    Quiet,
    grouped,
)
from scconv_deploy.commands.session import command_line, run_session
from scconv_deploy.errors import UsageError
from scconv_deploy.records.stage import Progress
from scconv_deploy.report.verdict import parity_error

if TYPE_CHECKING:
    from scconv_deploy.model.spec import ModelSpec
    from scconv_deploy.workers.tasks import Workers
    from scconv_deploy.workflows.deploy import DeployResult


@grouped
def deploy(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE.onnx",
            help="A zoo name, package.module:factory, path/file.py:factory, a pickled module, or any exporter's file.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The bundle's folder.")],
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The model that FILE.onnx came from; without it the file is its own."),
    ] = None,
    of_model: ModelOptions = ModelOptions(),
    judged: CheckOptions = CheckOptions(),
    graph: GraphOptions = GraphOptions(),
    int8: Int8Options = Int8Options(),
    engines: EngineOptions = EngineOptions(),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a model (or rewrite a file), verify the artifact, build engines if asked, and write a bundle."""
    from scconv_deploy.commands.printing import print_deploy

    deployment = Deployment(model, output, reference, of_model, judged, graph, int8, engines, force)
    with run_session(as_json, quiet) as session:
        result = deployment.run(command_line(), session.progress)
        session.show(result, print_deploy)
        if not result:
            raise parity_error(result.artifact, result.report, "Do not ship it; see report.json.")


@dataclass(frozen=True)
class Deployment:
    """What ``deploy`` was asked for, on the command line or in a run file."""

    model: str
    output: Path
    reference: str | None
    of_model: ModelOptions
    judged: CheckOptions
    graph: GraphOptions
    int8: Int8Options
    engines: EngineOptions
    force: bool

    def run(self, command: str, progress: Progress, workers: Workers | None = None) -> DeployResult:
        """Write the bundle.

        Args:
            command: line that the bundle names as the one that made it.
            workers: processes for the rows of the data that run free.

        Raises:
            ScconvDeployError: with the reason and the remedy.
        """
        from scconv_deploy.workflows.deploy import deploy_spec
        from scconv_deploy.workflows.deploy_file import deploy_file
        from scconv_deploy.workflows.subject import Model as InPyTorch
        from scconv_deploy.workflows.subject import OnnxFile, subject_of

        subject = subject_of(self.model)
        if not isinstance(subject, InPyTorch | OnnxFile) or (isinstance(subject, OnnxFile) and subject.rejected):
            raise UsageError(f"{self.model} is a finished artifact, expected a model or an ONNX file.", "See verify.")
        judged, graph, engines = self.judged, self.graph, self.engines
        spec = self.of_model.spec(self.model)
        backends = parse_backends(engines.backend)
        checks = self.int8.checks(judged) if graph.is_int8 else judged.checks()
        quantization = self.int8.quantization(graph, judged.data, judged.preprocessing, self.of_model.seed, spec.source)
        options = graph.export(backends, quantization)
        request = engine_request(
            backends, engines.target, spec.dynamic, engines.plugin, engines.require_plugin, engines.debug_tensors
        )
        common: dict[str, Any] = {
            "checks": replace(checks, workers=workers), "engines": request, "plugin_cpu": engines.plugin_cpu,
            "cache": chosen_cache(engines.cache, engines.no_cache), "force": self.force, "command": command,
            "progress": progress,
        }  # fmt: skip
        if isinstance(subject, OnnxFile):
            if engines.baseline:
                raise UsageError("--baseline is exported like the model, and this is a file.", "Build it on its own.")
            reference, seed = self._of_file(), self.of_model.seed
            return deploy_file(subject.path, self.output, options, reference=reference, seed=seed, **common)
        if self.reference is not None:
            raise UsageError("--reference is for an ONNX file; a model is its own.", "Leave it out.")
        return deploy_spec(spec, self.output, options, baseline=engines.baseline, **common)

    def _of_file(self) -> ModelSpec | None:
        """The model that a file came from; without one, options that only a model has are refused (UsageError).

        ``--batch`` and ``--dynamic`` give the ranges of the file's own open axes.
        """
        if self.reference is not None:
            return self.of_model.spec(self.reference)
        ranges = ("--batch", "--dynamic")
        if names := [name for name in self.of_model.given if name not in ranges]:
            raise UsageError(
                f"{self.model} is a file, to which {', '.join(names)} means nothing.",
                "Name its model with --reference MODEL.",
            )
        return None


@grouped
def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The ONNX file.")],
    of_model: ModelOptions = ModelOptions(),
    graph: GraphOptions = GraphOptions(),
    int8: Int8Options = Int8Options(),
    data: Data = None,
    preprocessing: Preprocess = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Export a model to ONNX, each SRU as one node, without verification."""
    from scconv_deploy.commands.printing import print_export

    with run_session(as_json, quiet) as session:
        from scconv_deploy.workflows.export import export_spec

        if int8.max_drop is not None:
            raise UsageError("--max-drop judges, and export does not.", "Use deploy, or quantize --reference MODEL.")
        if data is not None and not graph.is_int8:
            raise UsageError("--data is what int8 is calibrated on.", "Add --precision int8, or leave it out.")
        spec = of_model.spec(model)
        quantization = int8.quantization(graph, data, preprocessing, of_model.seed, spec.source)
        result = export_spec(spec, output, graph.export(quantization=quantization), force, session.progress)
        session.show(result, print_export)


@grouped
def inspect(
    target: Annotated[
        str, typer.Argument(metavar="MODEL|ARTIFACT", help="A model, an ONNX file, a bundle, or an engine.")
    ],
    of_model: ModelOptions = ModelOptions(),
    data: Data = None,
    plugin: Plugin = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show the contents of a model or an artifact."""
    from scconv_deploy.commands.printing import print_engine, print_model, print_onnx

    with run_session(as_json, quiet) as session:
        from scconv_deploy.workflows.inspect import inspect_engine, inspect_model, inspect_onnx
        from scconv_deploy.workflows.subject import Engine, Model, subject_of

        subject = subject_of(target)
        if plugin is not None and not isinstance(subject, Engine):
            raise UsageError("--plugin belongs to an engine.", "Leave it out.")
        if isinstance(subject, Model):
            session.show(inspect_model(of_model.spec(subject.source), data, session.progress), print_model)
            return
        if of_model != ModelOptions() or data:
            raise UsageError(f"{target} is an artifact; options of a model mean nothing to it.", "Leave them out.")
        if isinstance(subject, Engine):
            session.show(inspect_engine(subject.path, plugin), print_engine)
        else:
            session.show(inspect_onnx(subject), print_onnx)


def models(
    table: Annotated[
        Path | None,
        typer.Option("--table", metavar="FILE", help="Also write a Markdown table with the paper's counts."),
    ] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List the zoo: parameters, multiply-adds, default input, source."""
    from scconv_deploy.commands.printing import print_models

    with run_session(as_json, quiet) as session:
        from scconv_deploy.system.atomic import check_output_file, write_file
        from scconv_deploy.zoo.catalogue import document, list_models

        if table is not None:
            check_output_file(table, force)
        listing = list_models(progress=session.progress)
        if table is not None:
            write_file(table, document(listing).encode())
        session.show(listing, print_models)
