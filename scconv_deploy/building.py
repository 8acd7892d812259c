"""``scconv-deploy build``: an ONNX file to an engine with its manifest, through the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from scconv_deploy.bundle.atomic import check_output_file
from scconv_deploy.errors import UsageError
from scconv_deploy.exporters.build_options import BuildOptions
from scconv_deploy.exporters.engine import EngineManifest, sidecar
from scconv_deploy.exporters.engine_build import (
    BuildResult,
    Prepared,
    Progress,
    build_network,
    expanded,
    prepare,
)
from scconv_deploy.exporters.engine_cache import EngineCache
from scconv_deploy.exporters.gpu import gpus
from scconv_deploy.exporters.onnx_source import OnnxSource
from scconv_deploy.report.records import Link, ParityReport, StageLog
from scconv_deploy.verification.onnx_file import read_onnx

ENGINE_LINK = "engine"


def build_file(
    source: Path,
    output: Path,
    options: BuildOptions,
    *,
    cache: EngineCache | None = None,
    force: bool = False,
    command: str = "",
    progress: Progress = lambda message: None,
) -> BuildResult:
    """Build an engine from an ONNX file.

    Args:
        cache: None for none.
        force: overwrite.

    Raises:
        UsageError, IntegrityError: the file, the options or the output.
        MissingRuntimeError: the library, or a GPU that the options need.
        BuildError: the library refuses.
    """
    for path in (output, sidecar(output)):
        check_output_file(path, force)
    if output.suffix == ".onnx" or output.resolve() == source.resolve():
        raise UsageError(f"{output} would be an engine under an ONNX file's name.", "Name it for example model.engine.")
    prepared = prepare(options, cache)
    model = read_onnx(source)
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    return build_network(
        OnnxSource(model), digest, output, options, prepared, cache=cache, command=command, progress=progress
    )


@dataclass(frozen=True)
class EngineBuilder:
    """The engines of a bundle: each backend's options with what :func:`prepare` gave."""

    wanted: Sequence[tuple[BuildOptions, Prepared]] = ()
    cache: EngineCache | None = None
    command: str = ""
    progress: Progress = lambda message: None

    def build(
        self, model: onnx.ModelProto, data: bytes, folder: Path, report: ParityReport
    ) -> tuple[tuple[EngineManifest, ...], ParityReport, tuple[str, ...]]:
        """Write ``model.<backend>.engine`` for each backend into a folder.

        Returns:
            the manifests, the report with the stage and the link "engine", and notes.
        """
        if not self.wanted:
            return (), report, ()
        log = StageLog()
        manifests: list[EngineManifest] = []
        notes: list[str] = []
        with log.stage("build") as stage:
            for options, prepared in self.wanted:
                if not report:
                    stage.skipped.append((options.backend, "the ONNX model failed parity"))
                    continue
                path = folder / f"model.{options.backend}.engine"
                digest = hashlib.sha256(data).hexdigest()
                result = build_network(
                    OnnxSource(model), digest, path, options, prepared,
                    cache=self.cache, command=self.command, progress=self.progress,
                )  # fmt: skip
                manifest = result.engine.manifest
                manifests.append(manifest)
                notes += result.notes
                stage.applied.append(f"{path.name}: {manifest.summary}{' (from the cache)' * result.from_cache}")
                stage.skipped += [(f"{options.backend}: {sru.site}", sru.reason) for sru in expanded(manifest)]
                stage.skipped += [(f"{options.backend} warns", warning) for warning in manifest.warnings]
        reason = _engine_reason(manifests)
        links = tuple(Link(o.name, "not run", reason) if o.name == ENGINE_LINK else o for o in report.links)
        stages = (*report.stages, *log.records)
        return tuple(manifests), replace(report, links=links, stages=stages), tuple(notes)


def _engine_reason(manifests: Sequence[EngineManifest]) -> str:
    """Why the link has no verdict, in front of what there is."""
    if not manifests:
        return "no engine was built: the ONNX model failed parity"
    built = "; ".join(f"{m.summary}, sha256 {m.sha256[:12]}" for m in manifests)
    why = "it has not been run here" if gpus() else "no GPU here can run it"
    return f"built, but {why}: {built}"
