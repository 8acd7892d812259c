"""``scconv-deploy build``: an ONNX file to an engine with its manifest, through the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from scconv_deploy.bundle.atomic import check_output_file
from scconv_deploy.bundle.device_files import write_device_files
from scconv_deploy.bundle.device_plan import DevicePlan, Unfinished
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
from scconv_deploy.exporters.profiles import resolve_profiles
from scconv_deploy.exporters.targets import DEVICES, DeviceTarget, split_targets
from scconv_deploy.report.records import Link, ParityReport, StageLog
from scconv_deploy.spec import DynamicAxis
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
    network = OnnxSource(model)
    return build_network(network, digest, output, options, prepared, cache=cache, command=command, progress=progress)


@dataclass(frozen=True)
class EngineRequest:
    """The engines that a bundle shall have.

    Attributes:
        here: built by this machine.
        devices: that build theirs themselves, from the bundle.
        axes: open ones of the model.
    """

    here: tuple[BuildOptions, ...] = ()
    devices: tuple[DeviceTarget, ...] = ()
    axes: tuple[DynamicAxis, ...] = ()

    @classmethod
    def of(cls, backends: Sequence[str], target: str, axes: tuple[DynamicAxis, ...]) -> EngineRequest:
        """Of what ``--backend`` and ``--target`` say (UsageError, see :func:`.exporters.targets.split_targets`)."""
        here: list[BuildOptions] = []
        devices: list[DeviceTarget] = []
        for backend, parts in split_targets(backends, target).items():
            devices += [DEVICES[part] for part in parts if part in DEVICES]
            rest = ",".join(part for part in parts if part not in DEVICES)
            if rest or not parts:
                here.append(BuildOptions(backend, rest, axes=axes))  # type: ignore[arg-type]
        return cls(tuple(here), tuple(devices), axes)


@dataclass(frozen=True)
class BuiltEngines:
    """What :class:`EngineBuilder` did; the report has its stage and the link "engine"."""

    report: ParityReport
    manifests: tuple[EngineManifest, ...] = ()
    notes: tuple[str, ...] = ()
    unfinished: tuple[Unfinished, ...] = ()


@dataclass(frozen=True)
class EngineBuilder:
    """The engines of a bundle: each backend's options with what :func:`prepare` gave, and what is left for devices."""

    wanted: Sequence[tuple[BuildOptions, Prepared]] = ()
    devices: Sequence[DeviceTarget] = ()
    axes: Sequence[DynamicAxis] = ()
    cache: EngineCache | None = None
    command: str = ""
    progress: Progress = lambda message: None

    def build(self, model: onnx.ModelProto, data: bytes, folder: Path, report: ParityReport) -> BuiltEngines:
        """Write ``model.<backend>.engine`` for each backend into a folder, and what devices need to build theirs."""
        if not self.wanted and not self.devices:
            return BuiltEngines(report)
        log = StageLog()
        source = OnnxSource(model)
        manifests: list[EngineManifest] = []
        notes: list[str] = []
        left: tuple[Unfinished, ...] = ()
        with log.stage("build") as stage:
            for options, prepared in self.wanted:
                if not report:
                    stage.skipped.append((options.backend, "the ONNX model failed parity"))
                    continue
                path = folder / f"model.{options.backend}.engine"
                digest = hashlib.sha256(data).hexdigest()
                result = build_network(
                    source, digest, path, options, prepared,
                    cache=self.cache, command=self.command, progress=self.progress,
                )  # fmt: skip
                manifest = result.engine.manifest
                manifests.append(manifest)
                notes += result.notes
                stage.applied.append(f"{path.name}: {manifest.summary}{' (from the cache)' * result.from_cache}")
                stage.skipped += [(f"{options.backend}: {sru.site}", sru.reason) for sru in expanded(manifest)]
                stage.skipped += [(f"{options.backend} warns", warning) for warning in manifest.warnings]
            if self.devices and report:
                profiles = resolve_profiles(source.facts.inputs, (), self.axes)
                plan = DevicePlan(tuple(self.devices), source.facts, profiles)
                write_device_files(folder, source, plan)
                left = plan.unfinished()
            why = "built on the device, from this bundle" if report else "the ONNX model failed parity"
            stage.skipped += [(f"tensorrt: {device.name}", why) for device in self.devices]
        reason = _engine_reason(manifests, left)
        links = tuple(Link(o.name, "not run", reason) if o.name == ENGINE_LINK else o for o in report.links)
        stages = (*report.stages, *log.records)
        return BuiltEngines(replace(report, links=links, stages=stages), tuple(manifests), tuple(notes), left)


def _engine_reason(manifests: Sequence[EngineManifest], left: Sequence[Unfinished]) -> str:
    """Why the link has no verdict, in front of what there is."""
    if not manifests and not left:
        return "no engine was built: the ONNX model failed parity"
    reasons = [str(entry) for entry in left]
    if manifests:
        built = "; ".join(f"{m.summary}, sha256 {m.sha256[:12]}" for m in manifests)
        why = "it has not been run here" if gpus() else "no GPU here can run it"
        reasons.insert(0, f"built, but {why}: {built}")
    return "; ".join(reasons)
