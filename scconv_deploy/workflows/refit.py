"""``scconv-deploy refit``: an engine with the weights of another ONNX file of the same network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scconv_deploy.errors import UsageError
from scconv_deploy.exporters.tensorrt.network import form_for
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource
from scconv_deploy.exporters.tensorrt.refit import refit_plan
from scconv_deploy.graph.file import read_onnx
from scconv_deploy.runtimes.tensorrt import log as logs
from scconv_deploy.runtimes.tensorrt.engine import (
    EngineArtifact,
    EngineManifest,
    check_engine_output,
    load_engine,
    write_engine,
)
from scconv_deploy.runtimes.tensorrt.plugin_library import is_registered
from scconv_deploy.runtimes.tensorrt.runner import check_plugin_of, holds_host_code, load_plugin_of, require_library
from scconv_deploy.system.environment import sha256_of

_REFITTABLE = {"REFIT", "STRIP_PLAN"}


@dataclass(frozen=True)
class RefitResult:
    """A refitted engine on disk, and the time that it took in seconds."""

    engine: EngineArtifact
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {**self.engine.as_json(), "seconds": self.seconds}


def refit_file(
    path: Path,
    source: Path,
    output: Path,
    *,
    plugin: Path | None = None,
    force: bool = False,
    command: str = "",
    progress: Callable[[str], None] = lambda message: None,
) -> RefitResult:
    """Write an engine with the weights of an ONNX file, and a manifest that says so.

    Args:
        path: engine that was built with ``--refit`` or ``--strip``; it stays as it is.
        plugin: the library that the engine was built with; None to look for it beside the engine.
        force: overwrite.

    Raises:
        UsageError: the engine is not refittable, the file is another network, or the output is refused.
        IntegrityError: the engine or the plugin is not what the manifest says, or the file is no ONNX model.
        MissingRuntimeError: the library or a GPU is missing.
        BuildError: the library refuses the weights.
    """
    start = time.perf_counter()
    check_engine_output(output, source, force)
    artifact = load_engine(path)
    manifest = artifact.manifest
    if not _REFITTABLE & set(manifest.flags):
        raise UsageError(
            f"{path} was not built with --refit or --strip, so its weights cannot be replaced.",
            "Build it with one of them.",
        )
    if plugin is not None:
        check_plugin_of(artifact, plugin)
    network, digest = OnnxSource(read_onnx(source)), sha256_of(source)
    _check_structure(artifact, source, network)
    module = require_library(artifact, "refitting deserialises the engine")
    progress(f"refitting {path.name}")
    with logs.library_log(module).recording():
        load_plugin_of(module, artifact, plugin)
    form = form_for(module.__version__, manifest.backend, bool(manifest.plugin_sha256), is_registered(module))  # type: ignore[arg-type]
    plan = refit_plan(module, artifact.verified_bytes(), network.read(form), holds_host_code(manifest))
    flags = set(manifest.flags) - _REFITTABLE | ({"REFIT"} if plan.refittable else set())
    refitted: EngineManifest = replace(
        manifest,
        sha256=sha256_of(plan.data),
        file_bytes=len(plan.data),
        flags=tuple(sorted(flags)),
        onnx_sha256=digest,
        command=command,
        warnings=plan.warnings,
        refitted_from=manifest.sha256,
    )
    return RefitResult(write_engine(output, plan.data, refitted), time.perf_counter() - start)


def _check_structure(artifact: EngineArtifact, source: Path, network: OnnxSource) -> None:
    """Refuse another network: weights that a full engine does not find in the file would silently stay the old ones."""
    known = artifact.manifest.structure_sha256
    if not known:
        raise UsageError(
            f"The manifest of {artifact.path} does not say which network it is: it was built on a device, or its "
            "constants were folded.",
            "Build another engine from the new file.",
        )
    if network.structure_sha256 != known:
        raise UsageError(
            f"{source} differs from the network that {artifact.path} was built from in more than its weights.",
            "Give a file that was exported like the engine's, or build an engine from this one.",
        )
