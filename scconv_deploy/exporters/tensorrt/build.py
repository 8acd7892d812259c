"""Build an engine with its manifest from a model's bytes, or take it from the cache. No ``onnx``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

from scconv_deploy.exporters.tensorrt.builder import Plan, build_plan, check_options, device
from scconv_deploy.exporters.tensorrt.cache import EngineCache, entry_key
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.exporters.tensorrt.profiles import check_ranges, resolve_profiles
from scconv_deploy.exporters.tensorrt.source import NetworkSource
from scconv_deploy.exporters.tensorrt.targets import check_build_target
from scconv_deploy.runtimes.tensorrt.engine import (
    EngineArtifact,
    EngineManifest,
    EngineProfile,
    EngineSRU,
    write_engine,
)
from scconv_deploy.runtimes.tensorrt.versions import load_module
from scconv_deploy.system.environment import platform_facts, sha256_of
from scconv_deploy.version import __version__

Progress = Callable[[str], None]
_BAR = 24
Prepared = tuple[ModuleType, tuple[str, ...]]


@dataclass(frozen=True)
class BuildResult:
    """An engine, whether it came from the cache, its build time in seconds, and notes for the user."""

    engine: EngineArtifact
    from_cache: bool
    seconds: float
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            **self.engine.as_json(), "from_cache": self.from_cache, "seconds": self.seconds, "notes": list(self.notes),
        }  # fmt: skip


def prepare(options: BuildOptions, cache: EngineCache | None) -> Prepared:
    """Load the library, and refuse options that cannot work before anything takes time.

    Returns:
        the library's module, and notes on the cache.

    Raises:
        MissingRuntimeError, UsageError: see :func:`scconv_deploy.exporters.tensorrt.builder.check_options`.
    """
    check_build_target(options.backend, options.target)
    check_ranges(options.shapes, options.axes, options.profiles)
    module = load_module(options.backend)
    check_options(module, options)
    note = cache.check() if cache is not None else ""
    return module, (note,) if note else ()


def build_network(
    source: NetworkSource,
    onnx_sha256: str,
    output: Path,
    options: BuildOptions,
    prepared: Prepared,
    *,
    cache: EngineCache | None,
    command: str,
    progress: Progress,
) -> BuildResult:
    """Build an engine and write it with its manifest, or take it from the cache.

    Args:
        onnx_sha256: of the ONNX file that the manifest names.
        prepared: result of :func:`prepare`.

    Raises:
        UsageError, ModelError, IntegrityError, BuildError: see :func:`.builder.build_plan`.
    """
    start = time.perf_counter()
    module, notes = prepared
    writable = cache is not None and not notes  # a note says why the cache cannot be written
    profiles = resolve_profiles(source.facts.shapes, options.shapes, options.axes, options.profiles)
    gpu = device(options)
    if cache is not None and writable and options.backend == "tensorrt" and options.timing_cache is None:
        key = entry_key({"version": module.__version__, "gpu": gpu})
        options = replace(options, timing_cache=cache.timing_file(key))
    key = _key(source, module, options, profiles, gpu)
    found, note = cache.find(key) if cache is not None else (None, "")
    notes += (note,) if note else ()
    if found is not None and not (options.require_plugin and expanded(found.manifest)):  # else the build refuses
        manifest = replace(found.manifest, command=command, onnx_sha256=onnx_sha256)
        engine = write_engine(output, found.verified_bytes(), manifest)
        return BuildResult(engine, True, time.perf_counter() - start, notes + _unmarked(options, manifest))

    def tell(fraction: float, phase: str) -> None:
        done = round(fraction * _BAR)
        progress(f"building {output.name}  {'#' * done}{'-' * (_BAR - done)} {fraction:4.0%}  {phase}")

    plan = build_plan(module, source, options, profiles, tell)
    seconds = time.perf_counter() - start
    manifest = _manifest(plan, module, options, profiles, gpu, onnx_sha256, command, seconds)
    if not plan.folded:  # else its weights are not the file's, and it cannot be refitted from one
        manifest = replace(manifest, structure_sha256=source.structure_sha256)
    if cache is not None and writable:
        kept = cache.store(key, plan.data, manifest)
        notes += (kept,) if kept else ()
    notes += _unmarked(options, manifest)
    return BuildResult(write_engine(output, plan.data, manifest), False, seconds, notes)


def _unmarked(options: BuildOptions, manifest: EngineManifest) -> tuple[str, ...]:
    """Note that nothing could be marked, though it was asked for; whether the engine came from the cache or not."""
    if not options.debug_tensors or manifest.debug_tensors:
        return ()
    return ("--debug-tensors marked nothing: no SRU in the graph has an end that can be marked",)


def expanded(manifest: EngineManifest) -> list[EngineSRU]:
    """The SRUs that got no plugin."""
    return [sru for sru in manifest.srus if sru.form == "expanded"]


def _key(
    source: NetworkSource, module: ModuleType, options: BuildOptions, profiles: tuple[EngineProfile, ...], gpu: str
) -> str:
    """Cache key of everything that the engine depends on; the path of the timing cache is no part of it."""
    chosen = asdict(replace(options, plugin=None, timing_cache=None, require_plugin=False))
    for name in ("auto_plugin", "shapes", "axes", "profiles"):  # the resolved profiles stand for the last three
        del chosen[name]
    plugin = sha256_of(options.plugin) if options.plugin else ""
    return entry_key(
        {
            "onnx": source.content_sha256,
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
        sha256=sha256_of(plan.data),
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
        versions={"scconv-deploy": __version__, "python": platform_facts()["python"]},
        plan=plan.compiled,
        debug_tensors=plan.debug_tensors,
        quantized=plan.quantized,
    )
