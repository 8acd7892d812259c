"""Builder for TensorRT 10.3 to 11.x and TensorRT-RTX; :data:`.versions.FEATURES` lists the differences.

Networks are strongly typed in every version: the precision is in the ONNX model, never in flags. TF32 is off unless
asked for (TensorRT-RTX has it on by default, measured).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from scconv_deploy.errors import BuildError, UsageError
from scconv_deploy.exporters.tensorrt.cache import read_timing, write_timing
from scconv_deploy.exporters.tensorrt.compiled_plan import compiled_plan, open_batch, quantized_layers
from scconv_deploy.exporters.tensorrt.network import (
    form_for,
    layers_of,
    load_plugin,
    mark_srus,
    parse,
    srus_of,
    tensors_of,
)
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.exporters.tensorrt.plugin_probe import require_plugins
from scconv_deploy.exporters.tensorrt.source import Form, NetworkSource
from scconv_deploy.exporters.tensorrt.targets import DEVICES
from scconv_deploy.runtimes.tensorrt import log as logs
from scconv_deploy.runtimes.tensorrt.engine import (
    CompiledPlan,
    DebugTensor,
    EngineLayer,
    EngineProfile,
    EngineQuantized,
    EngineSRU,
    EngineTensor,
)
from scconv_deploy.runtimes.tensorrt.plugin_library import is_registered
from scconv_deploy.runtimes.tensorrt.versions import FEATURES, lookup, require, require_gpu
from scconv_deploy.system.backends import BACKENDS
from scconv_deploy.system.gpu import gpus
from scconv_deploy.system.signals import held

Result = TypeVar("Result")
_SLOW_S = 60.0
_SLOW = "slow: consecutive SRUs on 4x4 pixels or fewer? See Known in docs/engines.md"
_SILENT_S, _GRACE_S = 0.5, 5.0  # together less than the 10 s that docker stop gives


@dataclass(frozen=True)
class Plan:
    """Result of a build: the engine's bytes, and what the library says about it."""

    data: bytes
    compute_capabilities: tuple[str, ...]
    flags: tuple[str, ...]
    settings: dict[str, Any]
    inputs: tuple[EngineTensor, ...]
    outputs: tuple[EngineTensor, ...]
    layers: tuple[EngineLayer, ...]
    srus: tuple[EngineSRU, ...]
    plugin_sha256: str
    warnings: tuple[str, ...]
    compiled: CompiledPlan | None = None
    folded: bool = False
    debug_tensors: tuple[DebugTensor, ...] = ()
    quantized: tuple[EngineQuantized, ...] = ()


# --- before anything is done -------------------------------------------------------------------------------------


def check_options(module: ModuleType, options: BuildOptions) -> None:
    """Refuse options that this version or this machine cannot serve.

    Raises:
        UsageError: an option that the version lacks, or an unknown target.
        MissingRuntimeError: a GPU is needed and missing.
    """
    wanted = {
        name: bool(getattr(options, name))
        for name in ("tf32", "strip", "refit", "version_compatible", "plugin", "serialize_plugin", "timing_cache")
    }
    given = ("optimization_level", "workspace_bytes", "debug_tensors")
    wanted |= {name: getattr(options, name) is not None for name in given}
    if options.hardware_compatibility is not None:
        wanted[options.hardware_compatibility] = True
    for name, asked in wanted.items():
        if asked:
            require(module, options.backend, name)
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        level = options.optimization_level
        raise UsageError(f"--optimization-level {level}: expected 0 to 5.", "Use 3, the default, or leave it out.")
    if options.serialize_plugin and options.plugin is None and not options.auto_plugin:
        raise UsageError("--serialize-plugin needs a plugin.", "Add --plugin FILE or --plugin auto.")
    if options.serialize_plugin and options.backend == "tensorrt" and not options.version_compatible:
        # NvInfer.h, IBuilderConfig::setPluginsToSerialize: "to be serialized with version-compatible engines"
        raise UsageError(
            "--serialize-plugin: TensorRT puts a plugin into version-compatible engines only.",
            "Add --version-compatible, or ship the library beside the engine.",
        )
    if options.plugin is not None and not options.plugin.is_file():
        raise UsageError(f"--plugin {options.plugin} is not a file.", "Build it with scconv-deploy plugin build.")
    compute_capabilities(module, options)
    _check_gpu(options, [name for name, asked in wanted.items() if asked])


def _check_gpu(options: BuildOptions, wanted: Iterable[str]) -> None:
    if why := BACKENDS[options.backend].why_gpu:
        require_gpu(
            options.backend,
            why,
            f"Build on the machine with the GPU; for a Jetson: deploy --target {', '.join(DEVICES)}.",
        )
        return
    if options.resolved_target == "local":
        require_gpu("tensorrt-rtx", "--target local is this machine's GPU", "Name GPUs instead: --target sm89,sm120.")
    for name in wanted:
        if why := FEATURES[name].rtx_needs_gpu:
            require_gpu("tensorrt-rtx", f"{FEATURES[name].option}: {why}", f"Leave out {FEATURES[name].option}.")


def compute_capabilities(module: ModuleType, options: BuildOptions) -> tuple[str, ...]:
    """Names in ``module.ComputeCapability`` for the target; empty for the library's default.

    Raises:
        UsageError: an unknown target, or one that the backend does not take.
    """
    target = options.resolved_target
    if options.backend == "tensorrt":
        if target != "local":
            remedy = "Leave --target out; --hardware-compatibility ampere+ makes the engine run on newer GPUs as well."
            if target in DEVICES:
                remedy = f"scconv-deploy deploy MODEL --backend tensorrt --target {target} makes a bundle for it."
            raise UsageError(f"--target {target}: TensorRT builds for the GPU of this machine.", remedy)
        return ()
    require(module, options.backend, "compute_capabilities")
    known = {n.lower(): n for n in module.ComputeCapability.__members__ if n.startswith("SM")}
    if target in ("local", "portable"):
        return ("CURRENT",) if target == "local" else ()
    asked = target.split(",")
    unknown = [part for part in asked if part not in known]
    if unknown:
        raise UsageError(
            f"--target {unknown[0]!r} is not known to TensorRT-RTX {module.__version__}.",
            f"Known: portable, local, {', '.join(sorted(known, key=lambda n: int(n[2:])))}.",
        )
    return tuple(known[part] for part in asked)


# --- the build ---------------------------------------------------------------------------------------------------


def build_plan(
    module: ModuleType,
    source: NetworkSource,
    options: BuildOptions,
    profiles: Sequence[EngineProfile],
    report: logs.Report = lambda fraction, phase: None,
) -> Plan:
    """Build an engine; :func:`check_options` comes first.

    Args:
        source: the model.
        report: called with the fraction done and the library's name of the phase.

    Raises:
        UsageError: a plugin of somebody else's is registered for one of the model's operators.
        MissingRuntimeError: this release of TensorRT-RTX takes no plugins.
        ModelError, IntegrityError: the source cannot give its bytes in the form that this version reads.
        BuildError: the library refuses the model or the options, or an SRU got no plugin where all must.
        KeyboardInterrupt: interrupted; the library has stopped, or it did not in time and its thread goes on.
    """
    log = logs.library_log(module)
    with log.recording() as messages:
        digest = load_plugin(module, options, source) if options.plugin else ""
        builder = module.Builder(log.logger)
        registered = bool(source.facts.srus) and is_registered(module)
        form = form_for(module.__version__, options.backend, options.plugin is not None, registered)
        network, parser, folded = _parsed(module, builder, log.logger, source, form, options)
        if folded:
            messages.clear()  # messages of the first try do not apply to the folded model
        layers = layers_of(network)
        srus = srus_of(source.facts, network, options)
        _require_plugins(srus, options)
        debug_tensors = mark_srus(network, source.facts) if options.debug_tensors == "srus" else ()
        config = builder.create_builder_config()
        capabilities = _configure(module, config, options)
        _add_profiles(builder, config, network, profiles, messages)
        timing = _attach_timing(config, options.timing_cache)
        progress = logs.Progress(report)
        monitor = config.progress_monitor = logs.progress_monitor(module, progress)
        slow = _SLOW if options.backend == "tensorrt-rtx" else ""  # TensorRT times kernels, which takes minutes
        kept = parser, monitor  # alive as long as the library works, which may be longer than this function

        def work() -> tuple[Any, object]:
            return builder.build_serialized_network(network, config), kept

        plan, _ = _interruptible(work, progress, slow)
        if plan is None:
            raise _failure(options, messages)
        _keep_timing(timing, options.timing_cache)
        data = bytes(plan)
        read_back = _flags(module, config), _settings(module, config, options)
        tensors = tensors_of(network)
    warnings = (*folded, *logs.warnings(messages))
    compiled = compiled_plan(messages, open_batch(profiles))
    quantized = quantized_layers(source.facts.quantized, compiled)
    return Plan(
        data, capabilities, *read_back, *tensors, layers, srus, digest, warnings, compiled, bool(folded), debug_tensors,
        quantized,
    )  # fmt: skip


def _parsed(
    module: ModuleType, builder: Any, logger: Any, source: NetworkSource, form: Form, options: BuildOptions
) -> tuple[Any, Any, tuple[str, ...]]:
    """Parse the model; if the parser refuses it, parse it again with its constants folded.

    Returns:
        network, parser, and a warning that constants were folded.
    """

    def read(data: bytes) -> tuple[Any, Any]:
        network = builder.create_network(1 << int(module.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        return network, parse(module, network, logger, data, source.facts, options)

    try:
        return *read(source.read(form)), ()
    except BuildError as refusal:
        folded = source.folded(form)
        if folded is None:
            raise
        if options.plugin is not None and options.backend == "tensorrt-rtx":
            require_plugins(module, options.plugin, lambda: folded)  # the first child did not come to an SRU
        return *read(folded), (f"constants were folded first, because the parser said: {refusal.message}",)


def _require_plugins(srus: Sequence[EngineSRU], options: BuildOptions) -> None:
    expanded = [sru for sru in srus if sru.form == "expanded"]
    if options.require_plugin and expanded:
        raise BuildError(
            f"--require-plugin: {len(expanded)} of {len(srus)} SRUs were expanded, the first is {expanded[0].site}: "
            f"{expanded[0].reason}.",
            "Leave out --require-plugin, or add --plugin auto.",
        )


def _configure(module: ModuleType, config: Any, options: BuildOptions) -> tuple[str, ...]:
    """Apply the options to a builder config. Returns the compute capabilities as the library has them."""
    flags = {
        "BuilderFlag.TF32": options.tf32,
        "BuilderFlag.STRIP_PLAN": options.strip,
        "BuilderFlag.REFIT": options.refit,
        "BuilderFlag.VERSION_COMPATIBLE": options.version_compatible,
    }
    for dotted, wanted in flags.items():
        (config.set_flag if wanted else config.clear_flag)(lookup(module, dotted))
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if options.workspace_bytes is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_bytes)
    if options.hardware_compatibility is not None:
        names = FEATURES[options.hardware_compatibility].attributes
        config.hardware_compatibility_level = lookup(module, names[1])
    if options.serialize_plugin and options.plugin is not None:
        config.plugins_to_serialize = [str(options.plugin.resolve())]
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # for the engine inspector
    names = compute_capabilities(module, options)
    if names:
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            if not config.set_compute_capability(getattr(module.ComputeCapability, name), index):
                raise BuildError(f"TensorRT-RTX refuses --target {name.lower()}.", "Leave it out.")
        count = config.num_compute_capabilities
        return tuple(config.get_compute_capability(i).name.lower() for i in range(count))
    return ()


def _add_profiles(
    builder: Any, config: Any, network: Any, profiles: Sequence[EngineProfile], messages: Sequence[tuple[str, str]]
) -> None:
    if all(-1 not in network.get_input(i).shape for i in range(network.num_inputs)):
        return  # an open axis needs a profile even for a single size
    for index in sorted({p.index for p in profiles}):
        profile = builder.create_optimization_profile()
        for p in profiles:
            if p.index == index:
                profile.set_shape(p.input, p.minimum, p.optimum, p.maximum)
        if config.add_optimization_profile(profile) != index:
            reason = next(iter(logs.errors(messages)), "no reason given")
            raise BuildError(
                f"The library refuses the profile: {reason}", "Check --batch, --dynamic, --shape and --profile."
            )


def _attach_timing(config: Any, path: Path | None) -> Any:
    """Attach the timing cache of a file; one of another device or version is replaced by an empty one."""
    if path is None:
        return None
    timing = config.create_timing_cache(read_timing(path))
    if timing is None or not config.set_timing_cache(timing, False):
        timing = config.create_timing_cache(b"")
        config.set_timing_cache(timing, False)
    return timing


def _keep_timing(timing: Any, path: Path | None) -> None:
    if path is not None and timing is not None:
        write_timing(path, bytes(timing.serialize()))


def _interruptible(work: Callable[[], Result], progress: logs.Progress, slow: str = "") -> Result:
    """Run ``work`` in a thread while this one waits for signals; report ``slow`` if it takes long.

    Python runs signal handlers in the main thread between its own instructions. If the library ran in it, that would be
    inside the progress monitor, and an exception must not cross the library.
    """
    results: list[Result] = []
    failures: list[BaseException] = []
    done = threading.Event()

    def target() -> None:
        try:
            results.append(work())
        except BaseException as error:  # raised again below, in the thread that asked
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=target, name="engine build")
    try:
        thread.start()
        if slow and not done.wait(_SLOW_S):
            progress.say(slow)
        done.wait()
    except KeyboardInterrupt:
        progress.cancel()
        if thread in threading.enumerate():
            _await_stop(done, progress)
        raise
    if failures:
        raise failures[0]
    return results[0]


def _await_stop(done: threading.Event, progress: logs.Progress) -> None:
    """Give the library time to stop; a second interrupt ends the wait.

    The library asks the monitor between its own steps only, and a step can take minutes (measured: 100 s for two SRUs
    on 8x4x4 with a dynamic batch). Ending the process then loses nothing: files are written after the build.
    """
    if done.wait(_SILENT_S):
        return
    with held():  # a second interrupt must not tear this message apart
        progress.say(f"stopping: waits up to {_GRACE_S:.0f} s for the library; Ctrl-C again ends at once")
    done.wait(_GRACE_S)


def _failure(options: BuildOptions, messages: Sequence[tuple[str, str]]) -> BuildError:
    reasons = logs.errors(messages)
    reason = reasons[0] if reasons else "no reason given"
    remedy = "See the reason; ONNX Runtime shows whether the model itself is sound."
    if "workspace" in reason.lower():
        remedy = "Give it more --workspace, or leave that out."
    return BuildError(f"{BACKENDS[options.backend].title} cannot build the engine: {reason}", remedy)


# --- read back ---------------------------------------------------------------------------------------------------


def _flags(module: ModuleType, config: Any) -> tuple[str, ...]:
    members: Mapping[str, Any] = module.BuilderFlag.__members__
    return tuple(sorted(name for name, flag in members.items() if config.get_flag(flag)))


def _settings(module: ModuleType, config: Any, options: BuildOptions) -> dict[str, Any]:
    settings = {
        "optimization_level": config.builder_optimization_level,
        "workspace_bytes": config.get_memory_pool_limit(module.MemoryPoolType.WORKSPACE),
    }
    settings["plugins_to_serialize"] = [Path(p).name for p in config.plugins_to_serialize]
    if options.backend == "tensorrt":  # TensorRT-RTX warns when it is asked
        settings["hardware_compatibility"] = config.hardware_compatibility_level.name
    return settings


def device(options: BuildOptions) -> str:
    """The GPU that a build for ``local`` depends on; "" for other targets."""
    found = gpus()
    return str(found[0]) if options.resolved_target == "local" and found else ""
