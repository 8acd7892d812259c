"""Commands that build and time engines: build, refit, bench, finish."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from scconv_deploy.commands.options import Digest, Force, Json, LoadOptions, Provider, Quiet, grouped
from scconv_deploy.commands.session import command_line, run_session
from scconv_deploy.errors import UsageError
from scconv_deploy.report.verdict import parity_error
from scconv_deploy.system.backends import BACKENDS, Backend

if TYPE_CHECKING:
    from scconv_deploy.exporters.tensorrt.cache import EngineCache
    from scconv_deploy.workflows.build import EngineRequest

_ENGINE, _TUNING = "Engine", "Tuning"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend", metavar="onnx|tensorrt|tensorrt-rtx", help="Backend of the artifact; repeatable. Default: onnx.",
        rich_help_panel=_ENGINE,
    ),
]  # fmt: skip
Targets = Annotated[
    list[str] | None,
    typer.Option(
        "--target",
        metavar="portable|local|smNN|DEVICE,...",
        help="Where the engine will run; repeatable. tensorrt-rtx: portable (default; GPUs from sm80 on), local, or "
        "sm89,sm120. tensorrt: local (default); for deploy also orin-jp6, orin-jp7, thor-jp7, which build theirs from "
        "the bundle.",
        rich_help_panel=_ENGINE,
    ),
]
CacheFolder = Annotated[
    Path | None,
    typer.Option(
        "--cache", metavar="DIR", help="Engine cache; default ~/.cache/scconv-deploy.", rich_help_panel=_ENGINE
    ),
]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Build without the cache.", rich_help_panel=_ENGINE)]
BackendOption = Annotated[Backend, typer.Option(help="The library that builds the engine.", rich_help_panel=_ENGINE)]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape", metavar="NAME:MIN:OPT:MAX", help="All axes of an input: x:1x3x64x64:8x3x64x64:32x3x64x64.",
        rich_help_panel=_ENGINE,
    ),
]  # fmt: skip
Profiles = Annotated[
    list[str] | None,
    typer.Option(
        "--profile",
        metavar="NAME:MIN:OPT:MAX,...",
        help="One optimization profile, with every open input; repeatable. Instead of --batch, --dynamic and --shape.",
        rich_help_panel=_ENGINE,
    ),
]
Tf32 = Annotated[bool, typer.Option("--tf32", help="Let fp32 convolutions use TF32.", rich_help_panel=_TUNING)]
Strip = Annotated[
    bool, typer.Option("--strip", help="Leave the weights out; refit before use.", rich_help_panel=_TUNING)
]
Refit = Annotated[bool, typer.Option("--refit", help="Let weights be replaced later.", rich_help_panel=_TUNING)]
Level = Annotated[int | None, typer.Option("--optimization-level", help="0 to 5.", rich_help_panel=_TUNING)]
Workspace = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Largest workspace, for example 512M or 2G.", rich_help_panel=_TUNING)
]
Hardware = Annotated[
    Literal["ampere+", "same-cc"] | None,
    typer.Option("--hardware-compatibility", help="Which other GPUs may run it.", rich_help_panel=_TUNING),
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="Later TensorRT may run it.", rich_help_panel=_TUNING)
]
TimingCache = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Timing cache file, instead of the one in the cache.", rich_help_panel=_TUNING),
]
_PLUGIN = "Fused SRU"
BuildPlugin = Annotated[
    str | None,
    typer.Option(
        "--plugin",
        metavar="FILE|auto",
        help="The plugin library; auto takes it from the cache or compiles it for the target.",
        rich_help_panel=_PLUGIN,
    ),
]
Plugin = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="The engine's plugin library, where it is not beside it.", rich_help_panel=_PLUGIN
    ),
]
Baseline = Annotated[
    str,
    typer.Option(
        metavar="MODEL", help="Compare the bytes that the engine's plan moves with this network's.",
        rich_help_panel=_ENGINE,
    ),
]  # fmt: skip
PluginCpu = Annotated[
    str,
    typer.Option(
        metavar="FILE|auto",
        help="Judge and ship the fused SRU for ONNX Runtime on CPUs; auto compiles it if there is a C++ compiler.",
        rich_help_panel=_PLUGIN,
    ),
]
SerializePlugin = Annotated[
    bool, typer.Option("--serialize-plugin", help="Put the library into the engine.", rich_help_panel=_PLUGIN)
]
RequirePlugin = Annotated[
    bool, typer.Option("--require-plugin", help="Exit 5 if an SRU got no plugin.", rich_help_panel=_PLUGIN)
]

DebugTensors = Annotated[
    Literal["srus"] | None,
    typer.Option(
        "--debug-tensors",
        help="Mark the inputs and outputs of the SRUs, so that verify can judge the inside of the engine.",
        rich_help_panel=_ENGINE,
    ),
]


@dataclass(frozen=True)
class EngineOptions:
    """Options of ``deploy`` about engines."""

    backend: Backends = None
    target: Targets = None
    plugin: BuildPlugin = None
    require_plugin: RequirePlugin = False
    plugin_cpu: PluginCpu = ""
    baseline: Baseline = ""
    debug_tensors: DebugTensors = None
    cache: CacheFolder = None
    no_cache: NoCache = False


def parse_size(option: str, text: str) -> int:
    """Read a size such as ``512M``, ``2G`` or a plain number as bytes (UsageError otherwise)."""
    match = re.fullmatch(r"(\d+)([KMG]?)(?:iB|B)?", text.strip())
    if match is None or int(match[1]) == 0:
        raise UsageError(f"{option} {text!r} is not a size.", "Write for example 512M or 2G.")
    size = int(match[1]) * _UNITS[match[2]]
    if size >= 1 << 63:
        raise UsageError(f"{option} {text!r} is {size} bytes, which no machine has.", "Write for example 512M or 2G.")
    return size


def chosen_cache(folder: Path | None, without: bool) -> EngineCache | None:
    """Engine cache chosen by ``--cache`` and ``--no-cache``; None for none."""
    from scconv_deploy.exporters.tensorrt.cache import EngineCache

    if without and folder is not None:
        raise UsageError("--cache and --no-cache exclude each other.", "Leave one of them out.")
    if without:
        return None
    return EngineCache.default() if folder is None else EngineCache(folder, chosen=True)


def parse_backends(names: Sequence[str] | None) -> tuple[str, ...]:
    """Backends of deploy, each once; onnx comes first and is always produced (UsageError for an unknown one)."""
    known = ("onnx", *BACKENDS)
    for name in names or ():
        if name not in known:
            raise UsageError(f"--backend {name!r} is not known.", f"Known: {', '.join(known)}.")
    return tuple(dict.fromkeys(("onnx", *(names or ()))))


def engine_request(
    backends: Sequence[str],
    targets: Sequence[str] | None,
    axes: Sequence[Any],
    plugin: str | None = None,
    require_plugin: bool = False,
    debug_tensors: Literal["srus"] | None = None,
) -> EngineRequest:
    """Engines requested of deploy: one for each backend but onnx, built here or on the named devices."""
    from scconv_deploy.workflows.build import EngineRequest

    wanted, target = [name for name in backends if name != "onnx"], ",".join(targets or ())
    if target and not wanted:
        raise UsageError(
            f"--target {target} is for engines, and none is asked for.", "Add --backend tensorrt or tensorrt-rtx."
        )
    return EngineRequest.of(wanted, target, tuple(axes), plugin, require_plugin, debug_tensors)


def build(
    source: Annotated[Path, typer.Argument(metavar="F.onnx", help="The ONNX file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The engine.")],
    backend: BackendOption,
    target: Targets = None,
    batch: Annotated[
        str | None, typer.Option(metavar="MIN:OPT:MAX", help="Range of axis 0 if it is open.", rich_help_panel=_ENGINE)
    ] = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:AXIS=MIN:OPT:MAX", help="Range of another open axis.", rich_help_panel=_ENGINE),
    ] = None,
    shape: Shapes = None,
    profile: Profiles = None,
    tf32: Tf32 = False,
    strip: Strip = False,
    refit: Refit = False,
    optimization_level: Level = None,
    workspace: Workspace = None,
    hardware_compatibility: Hardware = None,
    version_compatible: VersionCompatible = False,
    timing_cache: TimingCache = None,
    plugin: BuildPlugin = None,
    serialize_plugin: SerializePlugin = False,
    require_plugin: RequirePlugin = False,
    debug_tensors: DebugTensors = None,
    cache: CacheFolder = None,
    no_cache: NoCache = False,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build a TensorRT engine from an ONNX file; TensorRT-RTX needs no GPU for it."""
    from scconv_deploy.commands.printing import print_build

    with run_session(as_json, quiet) as session:
        from scconv_deploy.exporters.tensorrt.options import BuildOptions
        from scconv_deploy.exporters.tensorrt.profiles import ShapeRange, parse_profile
        from scconv_deploy.model.inputs import DynamicAxis
        from scconv_deploy.workflows.build import build_file

        axes = [] if batch is None else [DynamicAxis.parse_batch(batch)]
        options = BuildOptions(
            backend,
            ",".join(target or ()),
            shapes=tuple(ShapeRange.parse(text) for text in shape or ()),
            axes=(*axes, *(axis for text in dynamic or () for axis in DynamicAxis.parse_all(text))),
            profiles=tuple(map(parse_profile, profile or ())),
            tf32=tf32,
            strip=strip,
            refit=refit,
            optimization_level=optimization_level,
            workspace_bytes=None if workspace is None else parse_size("--workspace", workspace),
            hardware_compatibility=hardware_compatibility,
            version_compatible=version_compatible,
            serialize_plugin=serialize_plugin,
            require_plugin=require_plugin,
            debug_tensors=debug_tensors,
            timing_cache=timing_cache,
        ).with_plugin(plugin)
        kept = chosen_cache(cache, no_cache)
        result = build_file(
            source, output, options, cache=kept, force=force, command=command_line(), progress=session.progress
        )
        session.show(result, print_build)


def refit(
    engine: Annotated[Path, typer.Argument(metavar="F.engine", help="The engine, built with --refit or --strip.")],
    source: Annotated[Path, typer.Option("--from", metavar="F.onnx", help="The same network with the new weights.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="The refitted engine.")],
    plugin: Plugin = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Replace the weights of an engine without building it again; it needs the GPU that the engine is for."""
    from scconv_deploy.commands.printing import print_refit

    with run_session(as_json, quiet) as session:
        from scconv_deploy.workflows.refit import refit_file

        result = refit_file(
            engine, source, output, plugin=plugin, force=force, command=command_line(), progress=session.progress
        )
        session.show(result, print_refit)


@grouped
def bench(
    artifacts: Annotated[
        list[str], typer.Argument(metavar="ARTIFACT...", help="ONNX files, bundles, engines, or models (PyTorch).")
    ],
    of_models: LoadOptions = LoadOptions(),
    batch: Annotated[int, typer.Option(min=1, max=2**31 - 1, help="Size of axis 0 if it is open.")] = 1,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="[NAME:]SHAPE[:DTYPE]", help="Input of a model, or sizes of other open axes."),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Models also through torch.compile.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Engines also as a CUDA graph.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Also the layers of engines and ONNX files.")] = False,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="Where models run; auto is cuda where there is a GPU.")
    ] = "auto",
    rounds: Annotated[int, typer.Option(min=3, help="Timed runs of each subject.")] = 50,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before, not counted.")] = 5,
    threads: Annotated[
        int, typer.Option(min=0, max=4096, help="CPU threads of ONNX Runtime and torch; 0 is their default.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of weights and inputs.")] = 0,
    provider: Provider = "cpu",
    plugin: Plugin = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Also write the JSON.")] = None,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Time artifacts against each other, in turns: percentiles, throughput, host and device time, memory."""
    from scconv_deploy.commands.printing import print_bench

    with run_session(as_json, quiet) as session:
        import json

        from scconv_deploy.system.atomic import check_output_file, write_file
        from scconv_deploy.workflows.bench import bench_artifacts
        from scconv_deploy.workflows.bench_options import BenchOptions

        if output is not None:
            check_output_file(output, force)
        options = BenchOptions(
            batch, tuple(inputs or ()), compiled, cuda_graph, device, rounds, warmup, threads, seed, provider, plugin,
            of_models.spec, of_models.given, layers,
        )  # fmt: skip
        result = bench_artifacts(artifacts, options, command_line(), session.progress)
        if output is not None:
            write_file(output, (json.dumps(result.as_json(), indent=2) + "\n").encode())
        session.show(result, print_bench)


def finish(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle that deploy wrote for this device.")],
    digest: Digest = "",
    no_plugin: Annotated[bool, typer.Option("--no-plugin", help="Build without the fused SRU.")] = False,
    tensorrt_include: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where NvInfer.h is; default: TENSORRT_INCLUDE_DIR, the system."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs.")] = 100,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before, not counted.")] = 10,
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Build, judge and time the plugin and engine of a bundle on the device; finish.pyz does the same by itself."""
    from scconv_deploy.commands.printing import print_finish

    with run_session(as_json, quiet) as session:
        from scconv_deploy.bundle.device.finish import FinishOptions, finish_bundle

        options = FinishOptions(not no_plugin, tensorrt_include, digest, rounds, warmup, force)
        result = finish_bundle(bundle, options, command=command_line(), progress=session.progress)
        session.show(result, print_finish)
        if not result:
            raise parity_error(result.report.artifact, result.report, "Do not ship it.")
