"""Finish a bundle on its device: build plugin and engine, judge and time the engine.

Standard library, NumPy and TensorRT only. The hashes are checked before anything is built or loaded. Plugin, engine,
report and their manifest appear as ``device/`` in one step; the bundle's own manifest never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from scconv_deploy.bundle.contents import DEVICE, FINISH, MANIFEST, MODEL, PLUGIN_SOURCES, REJECTED, REPORT
from scconv_deploy.bundle.device.plan import DevicePlan, read_device_plan
from scconv_deploy.bundle.engine_verdict import judge_with_bundle
from scconv_deploy.bundle.folder import check_output_folder, new_folder
from scconv_deploy.bundle.manifest import bundle_digest, check_bundle, manifest_bytes
from scconv_deploy.bundle.reference import read_reference
from scconv_deploy.errors import MissingRuntimeError, ParityError
from scconv_deploy.exporters.tensorrt.build import build_network, expanded
from scconv_deploy.exporters.tensorrt.builder import check_options
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.exporters.tensorrt.profiles import ShapeRange
from scconv_deploy.records.parity import Latency, ParityReport
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact, EngineManifest, reject
from scconv_deploy.runtimes.tensorrt.runner import TensorRTRunner
from scconv_deploy.runtimes.tensorrt.versions import load_module
from scconv_deploy.runtimes.timing import measure
from scconv_deploy.system.atomic import write_file
from scconv_deploy.system.backends import Backend
from scconv_deploy.system.environment import environment_facts, sha256_of
from scconv_deploy.system.gpu import gpus
from scconv_deploy.system.machine import Machine, jetson_linux
from scconv_deploy.trt_plugins.build import LIBRARY, BuildRequest, build

Progress = Callable[[str], None]
WITHOUT = "or build without it: --no-plugin"


@dataclass(frozen=True)
class FinishOptions:
    """Options of finishing a bundle.

    Attributes:
        plugin: whether to build with the fused SRU.
        tensorrt_include: the folder of NvInfer.h; None to look for it.
        digest: the bundle's, as deploy printed it; "" leaves it unchecked.
        rounds, warmup: timed runs of the engine, and untimed runs before them.
        force: replace an earlier ``device/``.
    """

    plugin: bool = True
    tensorrt_include: Path | None = None
    digest: str = ""
    rounds: int = 100
    warmup: int = 10
    force: bool = False


@dataclass(frozen=True)
class FinishResult:
    """Result of finishing a bundle: ``device/`` with its digest, engine and report; true if the engine passed."""

    folder: Path
    engine: EngineManifest
    report: ParityReport
    digest: str
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.report)

    @property
    def lines(self) -> tuple[str, ...]:
        """Lines for the terminal: checks, SRUs by form, latency, notes, folder and digest."""
        rows = [(link.name, c.status, c.reason) for link in self.report.links for c in link.checks or (link,)]
        lines = [f"{name:<12} {status:<8} {reason}" for name, status, reason in rows]
        for form in ("plugin", "expanded"):
            srus = [sru for sru in self.engine.srus if sru.form == form]
            why = f": {srus[0].reason}" if srus and form == "expanded" else ""
            lines += [f"{form:<12} {len(srus)} SRUs{why}"] if srus else []
        lines += [f"latency      {entry.latency}" for entry in self.report.engines if entry.latency]
        lines += [f"note         {note}" for note in self.notes]
        facts = {
            "engine": self.engine.summary, "parity": self.report.verdict, "written": self.folder, "digest": self.digest,
        }  # fmt: skip
        return (*lines, *(f"{name:<12} {value}" for name, value in facts.items()))

    def as_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "digest": self.digest,
            "notes": list(self.notes),
            "engine": self.engine.as_json(),
            "report": self.report.as_json(),
        }


def judge(
    bundle: Path, engine: EngineArtifact, plugin: Path | None, log: StageLog, facts: Mapping[str, str]
) -> ParityReport:
    """Judge an engine against the bundle's reference."""
    return judge_with_bundle(bundle, engine, log, plugin=plugin, provenance=facts)


def time_engine(
    engine: EngineArtifact, plugin: Path | None, inputs: Mapping[str, np.ndarray], options: FinishOptions
) -> Latency:
    """Measure the latency of an engine on one sample."""
    with TensorRTRunner(engine, plugin=plugin) as runner:
        runner.bind(inputs)
        return measure(runner.timed, inputs, options.rounds, options.warmup)


@dataclass(frozen=True)
class Device:
    """Access to the device, replaceable in tests.

    Attributes:
        backend: the library that builds.
        load: loads the library's module.
        judge, time: judge and time the engine.
    """

    backend: Backend = "tensorrt"
    machine: Machine = field(default_factory=Machine)
    load: Callable[[Backend], ModuleType] = load_module
    judge: Callable[..., ParityReport] = judge
    time: Callable[..., Latency] = time_engine


def finish_bundle(
    bundle: Path,
    options: FinishOptions = FinishOptions(),
    *,
    command: str = "",
    progress: Progress = lambda _: None,
    device: Device | None = None,
) -> FinishResult:
    """Build plugin and engine of a bundle, judge and time the engine, and write ``device/``.

    Raises:
        UsageError: no bundle, one for no device, or ``device/`` exists or cannot be written.
        MissingRuntimeError: no TensorRT, GPU, nvcc or header.
        BuildError: nvcc or TensorRT refuses.
        ParityError: the bundle's model failed parity.
        IntegrityError: a file differs from the manifest, or the manifest from the digest.
    """
    device = device or Device()
    digest = check_bundle(bundle, options.digest)
    if not (bundle / MODEL).is_file():
        raise ParityError(f"{bundle / MODEL}{REJECTED} failed parity; no engine is built from it.", "See report.json.")
    plan, inputs = read_device_plan(bundle), read_reference(bundle).run(0).inputs
    place = bundle / DEVICE
    check_output_folder(place, options.force)
    module = device.load(device.backend)
    wanted = _build_options(plan, device.backend)
    check_options(module, wanted)
    notes = _notes(plan, module, device)
    facts = {**_facts(bundle, digest, module, device, command), "notes": "; ".join(notes)}
    log = StageLog()
    with new_folder(place) as folder:
        plugin = _build_plugin(bundle, folder, plan, options, device, log, progress)
        if plugin is not None:
            wanted = replace(wanted, plugin=plugin, require_plugin=True)
        with log.stage("build") as stage:
            engine = _build_engine(bundle, folder, plan, module, wanted, command, progress)
            stage.applied.append(f"{engine.path.name}: {engine.manifest.summary}")
            stage.skipped += [(sru.site, sru.reason) for sru in expanded(engine.manifest)]
        progress("comparing the engine with PyTorch")
        report = device.judge(bundle, engine, plugin, log, facts)
        report = _timed(report, inputs, engine, plugin, options, device, log, progress)
        kept = engine if report else reject(engine)
        report = replace(report, artifact=f"{DEVICE}/{kept.path.name}", stages=tuple(log.records))
        write_file(folder / REPORT, report.as_bytes())
        own = manifest_bytes(folder, {**facts, "bundle_digest": digest, "verdict": report.verdict})
        write_file(folder / MANIFEST, own)
    return FinishResult(place, engine.manifest, report, bundle_digest(place), notes)


def _build_options(plan: DevicePlan, backend: Backend) -> BuildOptions:
    ranges = tuple(ShapeRange(p.input, p.minimum, p.optimum, p.maximum) for p in plan.profiles)
    return BuildOptions(backend, shapes=ranges)


def _build_engine(
    bundle: Path,
    folder: Path,
    plan: DevicePlan,
    module: ModuleType,
    wanted: BuildOptions,
    command: str,
    progress: Progress,
) -> EngineArtifact:
    """Build the engine on this device, without the cache. Its manifest names ``model.onnx``, whatever the form."""
    sealed = sha256_of(bundle / MODEL)
    path = folder / f"model.{wanted.backend}.engine"
    built = build_network(
        plan.source(bundle), sealed, path, wanted, (module, ()), cache=None, command=command, progress=progress
    )
    return built.engine


def _build_plugin(
    bundle: Path,
    folder: Path,
    plan: DevicePlan,
    options: FinishOptions,
    device: Device,
    log: StageLog,
    progress: Progress,
) -> Path | None:
    """Compile the fused SRU with this device's nvcc and headers; None without SRUs, or if the user wants no plugin."""
    with log.stage("plugin") as stage:
        if not plan.facts.srus or not options.plugin:
            why = "--no-plugin" if plan.facts.srus else "the model has no SRU"
            stage.skipped.append((LIBRARY, why))
            return None
        architectures = tuple(dict.fromkeys(gpu.compute_capability.replace(".", "") for gpu in gpus()))
        request = BuildRequest(architectures, options.tensorrt_include, sources=bundle / PLUGIN_SOURCES)
        progress("compiling the fused SRU")
        try:
            built = build(request, folder / LIBRARY, machine=device.machine)
        except MissingRuntimeError as error:
            raise MissingRuntimeError(error.message, f"{error.remedy.rstrip('.')}, {WITHOUT}.") from error
        stage.applied.append(f"{LIBRARY} for sm_{', sm_'.join(built.architectures)}, CUDA {built.cuda}")
        stage.skipped += [("TENSORRT_INCLUDE_DIR", note) for note in built.notes]
        return built.path


def _timed(
    report: ParityReport,
    inputs: Mapping[str, np.ndarray],
    engine: EngineArtifact,
    plugin: Path | None,
    options: FinishOptions,
    device: Device,
    log: StageLog,
    progress: Progress,
) -> ParityReport:
    with log.stage("latency") as stage:
        if not report:
            stage.skipped.append(("latency", "the engine failed parity"))
            return report
        progress("timing the engine")
        found = device.time(engine, plugin, inputs, options)
        stage.applied.append(str(found))
    return replace(report, engines=tuple(replace(entry, latency=found) for entry in report.engines))


def _notes(plan: DevicePlan, module: ModuleType, device: Device) -> tuple[str, ...]:
    """A note if the bundle was made for other devices; the engine is built and judged all the same."""
    here = {gpu.compute_capability.replace(".", "") for gpu in gpus()}
    linux = (jetson_linux(device.machine) or "").split(".")[0]
    fitting = [t.name for t in plan.targets if t.compute_capability in here and linux in map(str, t.linux)]
    if fitting:
        return ()
    names = ", ".join(target.name for target in plan.targets)
    found = f"compute capability {', '.join(sorted(here)) or 'unknown'}, TensorRT {module.__version__}"
    return (f"the bundle was made for {names}; this is another device: {found}",)


def _facts(bundle: Path, digest: str, module: ModuleType, device: Device, command: str) -> dict[str, str]:
    return {
        "bundle": digest,
        "command": command or f"python3 {FINISH} {bundle}",
        **environment_facts(),
        "numpy": np.__version__,
        device.backend: module.__version__,
        "gpu": ", ".join(map(str, gpus())) or "none",
        "jetson_linux": jetson_linux(device.machine) or "none",
    }
