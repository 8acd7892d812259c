"""``scconv-deploy build``: an ONNX file to an engine with its manifest, through the cache."""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from scconv_deploy import __version__
from scconv_deploy.bundle.atomic import check_output_file
from scconv_deploy.errors import UsageError
from scconv_deploy.exporters import engine_cache
from scconv_deploy.exporters.build_options import BuildOptions
from scconv_deploy.exporters.engine import (
    EngineArtifact,
    EngineManifest,
    EngineProfile,
    EngineSRU,
    sidecar,
    write_engine,
)
from scconv_deploy.exporters.engine_cache import EngineCache
from scconv_deploy.exporters.gpu import gpus
from scconv_deploy.exporters.profiles import resolve_profiles
from scconv_deploy.exporters.tensorrt import Plan, build_plan, check_options, device
from scconv_deploy.exporters.tensorrt_versions import load_module
from scconv_deploy.report.records import Link, ParityReport, StageLog
from scconv_deploy.verification.onnx_file import read_onnx

Progress = Callable[[str], None]
_BAR = 24


Prepared = tuple[ModuleType, tuple[str, ...]]
ENGINE_LINK = "engine"


@dataclass(frozen=True)
class BuildResult:
    """An engine, whether it came from the cache, how long it took, and what is to be said about it."""

    engine: EngineArtifact
    from_cache: bool
    seconds: float
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            **self.engine.as_json(), "from_cache": self.from_cache, "seconds": self.seconds, "notes": list(self.notes),
        }  # fmt: skip


def prepare(options: BuildOptions, cache: EngineCache | None) -> Prepared:
    """Load the library and refuse what cannot work, before anything takes time.

    Returns:
        the module, and notes on the cache.

    Raises:
        MissingRuntimeError, UsageError: see :func:`scconv_deploy.exporters.tensorrt.check_options`.
    """
    module = load_module(options.backend)
    check_options(module, options)
    note = cache.check() if cache is not None else ""
    return module, (note,) if note else ()


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
    return build_model(model, digest, output, options, prepared, cache=cache, command=command, progress=progress)


def build_model(
    model: onnx.ModelProto,
    onnx_sha256: str,
    output: Path,
    options: BuildOptions,
    prepared: Prepared,
    *,
    cache: EngineCache | None,
    command: str,
    progress: Progress,
) -> BuildResult:
    """The same for a model in memory; ``prepared`` is what :func:`prepare` gave."""
    start = time.perf_counter()
    module, notes = prepared
    profiles = resolve_profiles(model, options.shapes, options.axes)
    gpu = device(options)
    if cache is not None and options.backend == "tensorrt" and options.timing_cache is None:
        key = engine_cache.entry_key({"version": module.__version__, "gpu": gpu})
        options = replace(options, timing_cache=cache.timing_file(key))
    key = _key(model, module, options, profiles, gpu)
    found, note = cache.find(key) if cache is not None else (None, "")
    notes += (note,) if note else ()
    if found is not None and not (options.require_plugin and _expanded(found.manifest)):  # the build says why
        manifest = replace(found.manifest, command=command, onnx_sha256=onnx_sha256)
        engine = write_engine(output, found.verified_bytes(), manifest)
        return BuildResult(engine, True, time.perf_counter() - start, notes)

    def tell(fraction: float, phase: str) -> None:
        done = round(fraction * _BAR)
        progress(f"building {output.name}  {'#' * done}{'-' * (_BAR - done)} {fraction:4.0%}  {phase}")

    plan = build_plan(module, model, options, profiles, tell)
    seconds = time.perf_counter() - start
    manifest = _manifest(plan, module, options, profiles, gpu, onnx_sha256, command, seconds)
    if cache is not None:
        kept = cache.store(key, plan.data, manifest)
        notes += (kept,) if kept and kept not in notes else ()
    return BuildResult(write_engine(output, plan.data, manifest), False, seconds, notes)


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
                result = build_model(
                    model, digest, path, options, prepared,
                    cache=self.cache, command=self.command, progress=self.progress,
                )  # fmt: skip
                manifest = result.engine.manifest
                manifests.append(manifest)
                notes += result.notes
                stage.applied.append(f"{path.name}: {manifest.summary}{' (from the cache)' * result.from_cache}")
                stage.skipped += [(f"{options.backend}: {sru.site}", sru.reason) for sru in _expanded(manifest)]
                stage.skipped += [(f"{options.backend} warns", warning) for warning in manifest.warnings]
        reason = _engine_reason(manifests)
        links = tuple(Link(o.name, "not run", reason) if o.name == ENGINE_LINK else o for o in report.links)
        stages = (*report.stages, *log.records)
        return tuple(manifests), replace(report, links=links, stages=stages), tuple(notes)


def _expanded(manifest: EngineManifest) -> list[EngineSRU]:
    return [sru for sru in manifest.srus if sru.form == "expanded"]


def _engine_reason(manifests: Sequence[EngineManifest]) -> str:
    """Why the link has no verdict, in front of what there is."""
    if not manifests:
        return "no engine was built: the ONNX model failed parity"
    built = "; ".join(f"{m.summary}, sha256 {m.sha256[:12]}" for m in manifests)
    why = "it has not been run here" if gpus() else "no GPU here can run it"
    return f"built, but {why}: {built}"


def _key(
    model: onnx.ModelProto, module: ModuleType, options: BuildOptions, profiles: tuple[EngineProfile, ...], gpu: str
) -> str:
    """Of everything that the engine depends on: where the timing cache lies is no part of it, what it runs on is."""
    chosen = asdict(replace(options, plugin=None, timing_cache=None, shapes=(), axes=(), require_plugin=False))
    plugin = hashlib.sha256(options.plugin.read_bytes()).hexdigest() if options.plugin else ""
    return engine_cache.entry_key(
        {
            "onnx": hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest(),
            "options": chosen | {"target": options.resolved_target},
            "profiles": [asdict(profile) for profile in profiles],
            "library": module.__version__,
            "plugin": plugin,
            "gpu": gpu,
            "scconv_deploy": __version__,
        }
    )


def _manifest(
    plan: Plan,
    module: ModuleType,
    options: BuildOptions,
    profiles: tuple[EngineProfile, ...],
    gpu: str,
    onnx_sha256: str,
    command: str,
    seconds: float,
) -> EngineManifest:
    return EngineManifest(
        sha256=hashlib.sha256(plan.data).hexdigest(),
        file_bytes=len(plan.data),
        backend=options.backend,
        library_version=module.__version__,
        target=options.resolved_target,
        compute_capabilities=plan.compute_capabilities,
        gpu=gpu,
        flags=plan.flags,
        settings=plan.settings,
        inputs=plan.inputs,
        outputs=plan.outputs,
        profiles=profiles,
        layers=plan.layers,
        srus=plan.srus,
        plugin_sha256=plan.plugin_sha256,
        onnx_sha256=onnx_sha256,
        command=command,
        warnings=plan.warnings,
        build_seconds=seconds,
        versions={"scconv-deploy": __version__, "python": platform.python_version()},
    )
