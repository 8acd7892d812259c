"""``scconv-deploy build``: build an engine and its manifest from an ONNX file, through the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from scconv_deploy.bundle.device.plan import DevicePlan, Unfinished
from scconv_deploy.bundle.device_files import write_device_files
from scconv_deploy.errors import UsageError
from scconv_deploy.exporters.tensorrt.build import BuildResult, Prepared, Progress, build_network, expanded, prepare
from scconv_deploy.exporters.tensorrt.builder import build_plan
from scconv_deploy.exporters.tensorrt.cache import EngineCache
from scconv_deploy.exporters.tensorrt.onnx_source import OnnxSource
from scconv_deploy.exporters.tensorrt.options import BuildOptions, DebugTensors
from scconv_deploy.exporters.tensorrt.plugin_choice import with_plugin
from scconv_deploy.exporters.tensorrt.profiles import resolve_profiles
from scconv_deploy.exporters.tensorrt.source import NetworkSource
from scconv_deploy.exporters.tensorrt.targets import DEVICES, DeviceTarget, split_targets
from scconv_deploy.graph.file import check, read_onnx
from scconv_deploy.graph.forms import change_mask_form
from scconv_deploy.graph.types import quantization_of
from scconv_deploy.model.inputs import DynamicAxis
from scconv_deploy.records.engine import PlanTraffic
from scconv_deploy.records.parity import Link, ParityReport
from scconv_deploy.records.stage import StageLog
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact, EngineManifest, check_engine_output, reject
from scconv_deploy.system.atomic import write_file
from scconv_deploy.system.backends import Backend
from scconv_deploy.system.environment import sha256_of
from scconv_deploy.system.gpu import gpus
from scconv_deploy.trt_plugins.build import LIBRARY
from scconv_deploy.verification.engine.verdict import ENGINE_LINK, try_to_judge, with_engine

Judge = Callable[[EngineArtifact, Path | None], ParityReport]
"""(engine, plugin) -> report of the engine against the reference."""
_IN_FLOAT = "its weights are integers, and its kernel multiplies floats"


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
        cache: engine cache; None builds without one.
        force: overwrite.

    Raises:
        UsageError, IntegrityError: the file, the options or the output are refused.
        MissingRuntimeError: the library, or a GPU that the options need, is missing.
        BuildError: the library refuses the model.
    """
    check_engine_output(output, source, force)
    if options.plugin is not None and output.resolve() == options.plugin.resolve():
        raise UsageError(f"{output} would replace the plugin.", "Name the engine for example model.engine.")
    model = read_onnx(source)
    ((options, prepared),) = _prepared([options], cache, progress)
    digest = sha256_of(source)
    network = OnnxSource(model)
    result = build_network(network, digest, output, options, prepared, cache=cache, command=command, progress=progress)
    if left := result.engine.manifest.left_in_float:
        more = f" (and {len(left) - 1} more)" if len(left) > 1 else ""
        result = replace(result, notes=(*result.notes, f"{left[0].node}: {_IN_FLOAT}{more}"))
    if expanded(result.engine.manifest) and _for_onnx_runtime(model):
        cru = "" if quantization_of(model) else " --cru merged"  # merged convolutions would lose their quantisers
        better = f"scconv-deploy rewrite {source} --mask-form where{cru} -o FILE"
        note = f"its SRUs' functions are those for ONNX Runtime; TensorRT's compilers fuse what this writes: {better}"
        return replace(result, notes=(*result.notes, note))
    return result


def _for_onnx_runtime(model: onnx.ModelProto) -> bool:
    """Whether a function of an SRU has the body that ONNX Runtime is fast with, and TensorRT's compilers are not."""
    bodies = onnx.ModelProto()
    bodies.functions.extend(model.functions)
    return bool(change_mask_form(bodies, "where")[0])


def _prepared(
    wanted: Sequence[BuildOptions], cache: EngineCache | None, progress: Progress
) -> list[tuple[BuildOptions, Prepared]]:
    """Options with their plugin; what cannot work is refused before a plugin is compiled, which takes a minute."""
    for options in wanted:
        prepare(options, cache)
    return [(options, prepare(options, cache)) for options in with_plugin(wanted, progress)]


@dataclass(frozen=True)
class EngineRequest:
    """Engines requested for a bundle.

    Attributes:
        here: options of engines that this machine builds.
        devices: targets that build their engines from the bundle.
        axes: open axes of the model.
    """

    here: tuple[BuildOptions, ...] = ()
    devices: tuple[DeviceTarget, ...] = ()
    axes: tuple[DynamicAxis, ...] = ()

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Backends of the requested engines, each once."""
        on_devices: tuple[Backend, ...] = ("tensorrt",) if self.devices else ()
        return tuple(dict.fromkeys((*(options.backend for options in self.here), *on_devices)))

    @classmethod
    def of(
        cls,
        backends: Sequence[str],
        target: str,
        axes: tuple[DynamicAxis, ...],
        plugin: str | Path | None = None,
        require_plugin: bool = False,
        debug_tensors: DebugTensors | None = None,
    ) -> EngineRequest:
        """Make a request from the options of the command line.

        Args:
            plugin, require_plugin: of the engines built here, ``auto`` or a file; devices build their own plugin.
            debug_tensors: of the engines built here; those of devices have none.

        Raises:
            UsageError: see :func:`.exporters.tensorrt.targets.split_targets`; or no engine built here uses a plugin.
        """
        here: list[BuildOptions] = []
        devices: list[DeviceTarget] = []
        for backend, parts in split_targets(backends, target).items():
            devices += [DEVICES[part] for part in parts if part in DEVICES]
            rest = ",".join(part for part in parts if part not in DEVICES)
            if rest or not parts:
                options = BuildOptions(backend, rest, axes=axes, require_plugin=require_plugin)  # type: ignore[arg-type]
                options = replace(options, debug_tensors=debug_tensors)
                here.append(options.with_plugin(plugin))
        local = {"--plugin": plugin, "--require-plugin": require_plugin, "--debug-tensors": debug_tensors}
        if not here and (asked := [name for name, value in local.items() if value]):
            raise UsageError(
                f"{asked[0]} is for an engine that is built on this machine, and none is asked for.",
                "Add --backend tensorrt-rtx or tensorrt, or leave it out: devices build their own.",
            )
        return cls(tuple(here), tuple(devices), axes)


@dataclass(frozen=True)
class Baseline:
    """A network whose compiled plan an engine's is compared with; ``source`` exports it."""

    name: str
    source: Callable[[], NetworkSource]


@dataclass(frozen=True)
class BuiltEngines:
    """Result of :class:`EngineBuilder`; the report includes its stages and the links of engines."""

    report: ParityReport
    manifests: tuple[EngineManifest, ...] = ()
    notes: tuple[str, ...] = ()
    unfinished: tuple[Unfinished, ...] = ()


@dataclass(frozen=True)
class EngineBuilder:
    """Builder of the engines of a bundle: prepared options of each backend, and targets left for devices."""

    wanted: Sequence[tuple[BuildOptions, Prepared]] = ()
    devices: Sequence[DeviceTarget] = ()
    axes: Sequence[DynamicAxis] = ()
    cache: EngineCache | None = None
    command: str = ""
    progress: Progress = lambda message: None
    baseline: Baseline | None = None

    @classmethod
    def of(
        cls,
        request: EngineRequest,
        cache: EngineCache | None,
        command: str,
        progress: Progress = lambda message: None,
        baseline: Baseline | None = None,
    ) -> EngineBuilder:
        """For a request; what cannot be built is refused here, before anything takes time, see :func:`prepare`."""
        prepared = _prepared(request.here, cache, progress)
        if baseline is not None and not prepared:
            raise UsageError(
                f"--baseline {baseline.name} is compared with an engine that is built here, and none is asked for.",
                "Add --backend tensorrt-rtx, or leave it out.",
            )
        return cls(prepared, request.devices, request.axes, cache, command, progress, baseline)

    def build(
        self, model: onnx.ModelProto, data: bytes, folder: Path, report: ParityReport, judge: Judge | None = None
    ) -> BuiltEngines:
        """Write ``model.<backend>.engine`` for each backend into a folder, and the files that devices build from.

        An engine is judged if there is a GPU, and named ``*.rejected`` if it fails. Each engine has a link named after
        its backend; the link "engine" lists engines left for devices or not built.
        """
        if not self.wanted and not self.devices:
            return BuiltEngines(report)
        log = StageLog()
        source, digest = OnnxSource(model), sha256_of(data)
        made: list[tuple[EngineArtifact, Path | None]] = []
        notes: list[str] = []
        left: tuple[Unfinished, ...] = ()
        with log.stage("build") as stage:
            for options, prepared in self.wanted:
                if not report:
                    stage.skipped.append((options.backend, "the ONNX model failed parity"))
                    continue
                path = folder / f"model.{options.backend}.engine"
                result = build_network(
                    source, digest, path, options, prepared,
                    cache=self.cache, command=self.command, progress=self.progress,
                )  # fmt: skip
                manifest = result.engine.manifest
                made.append((result.engine, options.plugin))
                if options.plugin is not None:
                    write_file(folder / LIBRARY, options.plugin.read_bytes())
                notes += [note for note in result.notes if note not in notes]  # one cache gives one note
                stage.applied.append(f"{path.name}: {manifest.summary}{' (from the cache)' * result.from_cache}")
                stage.skipped += [(f"{options.backend}: {sru.site}", sru.reason) for sru in expanded(manifest)]
                stage.skipped += [(f"{options.backend}: {layer.node}", _IN_FLOAT) for layer in manifest.left_in_float]
                stage.skipped += [(f"{options.backend} warns", warning) for warning in manifest.warnings]
            if self.devices and report:
                profiles = resolve_profiles(source.facts.shapes, (), self.axes)
                plan = DevicePlan(tuple(self.devices), source.facts, profiles)
                for form in plan.forms:
                    check(source.proto(form), f"graph of {plan.file_of(form)}")
                write_device_files(folder, source, plan)
                left = plan.unfinished()
            why = "built on the device, from this bundle" if report else "the ONNX model failed parity"
            stage.skipped += [(f"tensorrt: {device.name}", why) for device in self.devices]
        links = [old for old in report.links if old.name != ENGINE_LINK]
        if left or not made:
            reason = "; ".join(map(str, left)) or "no engine was built: the ONNX model failed parity"
            links.append(Link(ENGINE_LINK, "not run", reason))
        report = replace(report, links=tuple(links), stages=(*report.stages, *log.records))
        for engine, plugin in made:
            report = with_engine(report, *self._judge(engine, plugin, judge))
        manifests = tuple(engine.manifest for engine, _ in made)
        if plans := self._plans([engine for engine, _ in made]):
            report = replace(report, plans=plans)
        return BuiltEngines(report, manifests, tuple(notes), left)

    def _plans(self, engines: Sequence[EngineArtifact]) -> tuple[PlanTraffic, ...]:
        """The plans of the engines that list them, and each library's plan of the baseline."""
        plans = [
            engine.manifest.plan.traffic(engine.path.name, engine.manifest.backend)
            for engine in engines
            if engine.manifest.plan is not None
        ]
        if self.baseline is None or not plans:
            return tuple(plans)
        self.progress(f"exporting the baseline {self.baseline.name}")
        source = self.baseline.source()
        for options, (module, _) in self.wanted:
            if not any(plan.backend == options.backend for plan in plans):
                continue
            self.progress(f"building the baseline {self.baseline.name}")
            plain = replace(options, plugin=None, require_plugin=False, serialize_plugin=False)
            profiles = resolve_profiles(source.facts.shapes, plain.shapes, plain.axes)
            compiled = build_plan(module, source, plain, profiles).compiled
            if compiled is not None:
                plans.append(compiled.traffic(self.baseline.name, options.backend, baseline=True))
        return tuple(plans)

    def _judge(
        self, engine: EngineArtifact, plugin: Path | None, judge: Judge | None
    ) -> tuple[Link, ParityReport | None]:
        """Link of an engine, and its report if it ran."""
        manifest = engine.manifest
        if judge is None or not gpus():
            why = "it was not asked to run" if gpus() else "no GPU here can run it"
            what = f"{manifest.summary}, sha256 {manifest.sha256[:12]}"
            return Link(manifest.backend, "not run", f"built, but {why}: {what}"), None
        self.progress(f"verifying {engine.path.name}")
        link, report = try_to_judge(engine, lambda: judge(engine, plugin))
        if link.status == "failed":
            reject(engine)
        return link, report
