"""``scconv-deploy bench``: artifacts and models timed against each other, in turns, on the same inputs."""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from scconv_deploy import __version__
from scconv_deploy import signature as signatures
from scconv_deploy.bundle.artifact import artifact_file
from scconv_deploy.errors import MissingRuntimeError, UsageError
from scconv_deploy.exporters.engine import EngineArtifact, load_engine
from scconv_deploy.exporters.gpu import gpus
from scconv_deploy.references import Progress, silent
from scconv_deploy.spec import InputSpec, ModelSpec, load
from scconv_deploy.timing import latency
from scconv_deploy.verification.onnx_file import read_onnx
from scconv_deploy.verification.runners.onnxruntime import CPU, OnnxRuntimeRunner, RuntimeOptions
from scconv_deploy.verification.runners.tensorrt import TensorRTRunner

_PAGE = "/proc/self/statm"


@dataclass(frozen=True)
class BenchOptions:
    """How is measured.

    Attributes:
        batch: size of axis 0 where it is open.
        inputs: ``[name:]shape[:dtype]``, for models that are not in the zoo and for other open axes.
        compiled: models also through torch.compile.
        cuda_graph: engines also as a CUDA graph.
        device: where models run.
        rounds, warmup: timed runs of each subject, and runs before them.
        threads: of ONNX Runtime and torch on the CPU; 0 is their default.
        provider: of ONNX Runtime.
        plugin: the library that the engines were built with.
    """

    batch: int = 1
    inputs: tuple[str, ...] = ()
    compiled: bool = False
    cuda_graph: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    rounds: int = 50
    warmup: int = 5
    threads: int = 0
    seed: int = 0
    provider: str = CPU
    plugin: Path | None = None

    @property
    def resolved_device(self) -> str:
        if self.device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        return self.device


@dataclass(frozen=True)
class BenchRow:
    """One subject.

    Attributes:
        p50_ms, p90_ms, p99_ms, mean_ms: wall clock of one run, copies to and from the device left out.
        items_per_s: samples of one run (axis 0) over the mean.
        device_p50_ms: between two events on the stream; None where there is no device.
        memory_bytes: of what ``memory_of`` names, more than before the subject was loaded: the process's resident set
            or the device's; None where it cannot be asked.
        load_s: until it was ready for its first run.
    """

    name: str
    kind: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    items_per_s: float
    device_p50_ms: float | None
    memory_bytes: int | None
    memory_of: Literal["process", "device"]
    load_s: float


@dataclass(frozen=True)
class BenchResult:
    """All subjects of one run; they took turns, so that a slow minute hits them all."""

    batch: int
    rounds: int
    warmup: int
    rows: tuple[BenchRow, ...]
    environment: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Subject:
    """Something ready to run: ``run`` does it once and returns the device's seconds, if there is a device."""

    name: str
    kind: str
    items: int
    run: Callable[[], float | None]
    memory_bytes: int | None
    memory_of: Literal["process", "device"]
    load_s: float


def bench_artifacts(
    names: Sequence[str], options: BenchOptions, command: str = "", progress: Progress = silent
) -> BenchResult:
    """Time ONNX files, bundles, engines and models.

    Args:
        names: a path that ends in ``.onnx`` or ``.engine``, a bundle's folder, or a MODEL.

    Raises:
        UsageError: a name that is none of them, or an open axis without a size.
        MissingRuntimeError: an engine, and no GPU or library for it.
        IntegrityError: an artifact that is not what it claims.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    with ExitStack() as stack:
        subjects: list[_Subject] = []
        for name in dict.fromkeys(names):
            progress(f"loading {name}")
            subjects += _subjects(name, options, stack)
        times, device_times = _measure(subjects, options, progress)
    rows = tuple(_row(s, times[s.name], device_times[s.name]) for s in subjects)
    return BenchResult(options.batch, options.rounds, options.warmup, rows, _environment(options, command))


def _subjects(name: str, options: BenchOptions, stack: ExitStack) -> list[_Subject]:
    path = Path(name)
    if name.endswith(".engine"):
        artifact = load_engine(path)
        graphs = (False, True) if options.cuda_graph else (False,)
        return [_engine(name, artifact, graph, options, stack) for graph in graphs]
    if name.endswith((".onnx", ".rejected")) or path.is_dir():
        return [_onnx(name, read_onnx(artifact_file(path)[0]), options, stack)]
    return [_pytorch(name, options, compiled) for compiled in ((False, True) if options.compiled else (False,))]


def _onnx(name: str, model: onnx.ModelProto, options: BenchOptions, stack: ExitStack) -> _Subject:
    before, start = _resident(), time.perf_counter()
    runner = stack.enter_context(OnnxRuntimeRunner(model, RuntimeOptions(options.provider, options.threads)))
    constants = {tensor.name for tensor in model.graph.initializer}
    shapes = {v.name: _onnx_shape(v, options) for v in model.graph.input if v.name not in constants}
    dtypes = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in model.graph.input}
    feed = {name: _noise(shape, dtypes[name], options.seed) for name, shape in shapes.items()}

    def run() -> None:
        runner.run(feed)

    run()
    memory = None if before is None else max(0, (_resident() or 0) - before)
    seconds = time.perf_counter() - start
    items = _items(shapes.values())
    where = "" if options.provider.lower().removesuffix("executionprovider") == "cpu" else f", {options.provider}"
    return _Subject(f"{name} (ONNX Runtime{where})", "onnxruntime", items, run, memory, "process", seconds)


def _onnx_shape(value: onnx.ValueInfoProto, options: BenchOptions) -> tuple[int, ...]:
    dims = value.type.tensor_type.shape.dim
    return _closed(value.name, [d.dim_value if d.HasField("dim_value") else -1 for d in dims], options)


def _closed(name: str, shape: Sequence[int], options: BenchOptions) -> tuple[int, ...]:
    """A shape without open axes: ``--input``'s where it names this one, else the batch on axis 0."""
    given = [InputSpec.parse(text) for text in options.inputs]
    chosen = next((i for i in given if i.name in (None, name)), None)
    if chosen is not None:
        return chosen.shape
    sizes = [options.batch if size == -1 and axis == 0 else size for axis, size in enumerate(shape)]
    if -1 in sizes:
        raise UsageError(f"Input {name!r} is {'x'.join(map(str, shape))}.", f"Add --input {name}:SHAPE.")
    return tuple(sizes)


def _noise(shape: tuple[int, ...], dtype: Any, seed: int) -> np.ndarray:
    """Standard normal numbers; zeros and ones for other types."""
    generator = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.floating):
        return generator.standard_normal(shape).astype(dtype)
    return generator.integers(0, 2, shape).astype(dtype)


def _engine(name: str, artifact: EngineArtifact, graph: bool, options: BenchOptions, stack: ExitStack) -> _Subject:
    start = time.perf_counter()
    runner = stack.enter_context(TensorRTRunner(artifact, graph, _plugin_of(artifact, options)))
    numpy_names = {
        "HALF": "float16",
        "INT64": "int64",
        "INT32": "int32",
        "INT8": "int8",
        "UINT8": "uint8",
        "BOOL": "bool",
    }
    feed = {
        t.name: _noise(_closed(t.name, t.shape, options), np.dtype(numpy_names.get(t.dtype, "float32")), options.seed)
        for t in artifact.manifest.inputs
    }
    runner.run(feed)
    memory = runner.device_memory_bytes + artifact.manifest.file_bytes
    label = f"{name} ({runner.name}{', CUDA graph' if graph else ''})"
    items = _items(value.shape for value in feed.values())
    return _Subject(label, runner.name, items, runner.timed, memory, "device", time.perf_counter() - start)


def _plugin_of(artifact: EngineArtifact, options: BenchOptions) -> Path | None:
    """The plugin, for the engines that were built with one."""
    return options.plugin if artifact.manifest.plugin_sha256 else None


def _pytorch(name: str, options: BenchOptions, compiled: bool) -> _Subject:
    device = options.resolved_device
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingRuntimeError(
            "torch finds no CUDA device.", "Leave --device out, or install a CUDA build of torch."
        )
    before, start = _resident(), time.perf_counter()
    given = tuple(InputSpec.parse(text) for text in options.inputs)
    spec = ModelSpec(name, inputs=given, seed=options.seed).resolved()
    if not given:
        spec = replace(spec, inputs=tuple(replace(i, shape=(options.batch, *i.shape[1:])) for i in spec.inputs))
    model = load(spec)
    signature = signatures.from_specs(model, spec.inputs, (), options.seed)
    allocated = 0
    if device == "cuda":
        torch.cuda.init()  # the counters below need it
        torch.cuda.reset_peak_memory_stats()  # of the subjects before
        allocated = torch.cuda.memory_allocated()
    model = model.to(device)
    tensors = {key: value.to(device) for key, value in signature.tensors.items()}
    target: Any = torch.compile(model) if compiled else model

    def run() -> float | None:
        with torch.inference_mode():
            if device == "cpu":
                signature.call(target, tensors)
                return None
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            signature.call(target, tensors)
            last.record()
            torch.cuda.synchronize()
            return first.elapsed_time(last) * 1e-3

    run()
    seconds = time.perf_counter() - start
    how, items = "torch.compile" if compiled else "PyTorch", _items(i.shape for i in spec.inputs)
    if device == "cuda":
        grown = torch.cuda.max_memory_allocated() - allocated
        return _Subject(f"{name} ({how})", how, items, run, grown, "device", seconds)
    memory = None if before is None else max(0, (_resident() or 0) - before)
    return _Subject(f"{name} ({how})", how, items, run, memory, "process", seconds)


def _resident() -> int | None:
    """Bytes of this process in memory; None where there is no /proc."""
    try:
        pages = int(Path(_PAGE).read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _measure(
    subjects: Sequence[_Subject], options: BenchOptions, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every subject by round: on the host's clock, and on the device where there is one."""
    order, shuffle = list(subjects), random.Random(options.seed).shuffle
    host: dict[str, list[float]] = {s.name: [] for s in subjects}
    device: dict[str, list[float]] = {s.name: [] for s in subjects}
    for index in range(options.warmup + options.rounds):
        counted = index >= options.warmup
        progress(f"round {index - options.warmup + 1} of {options.rounds}" if counted else "warming up")
        shuffle(order)
        for subject in order:
            start = time.perf_counter()
            on_device = subject.run()
            seconds = time.perf_counter() - start
            if counted:
                host[subject.name].append(seconds)
                device[subject.name] += [] if on_device is None else [on_device]
    return host, device


def _items(shapes: Iterable[tuple[int, ...]]) -> int:
    """How many samples one run takes: axis 0 of the first input that has one."""
    return next((shape[0] for shape in shapes if shape), 1)


def _row(subject: _Subject, seconds: Sequence[float], device: Sequence[float]) -> BenchRow:
    found = latency(seconds, device)
    return BenchRow(
        subject.name, subject.kind, found.p50_ms, found.p90_ms, found.p99_ms, found.mean_ms,
        subject.items / (found.mean_ms * 1e-3), found.device_p50_ms,
        subject.memory_bytes, subject.memory_of, subject.load_s,
    )  # fmt: skip


def _environment(options: BenchOptions, command: str) -> dict[str, str]:
    return {
        "command": command,
        "scconv-deploy": __version__,
        "python": platform.python_version(),
        "torch": version("torch"),
        "onnxruntime": version("onnxruntime"),
        "machine": f"{platform.system()} {platform.machine()}",
        "gpu": ", ".join(map(str, gpus())) or "none",
        "threads": str(options.threads or "default"),
        "seed": str(options.seed),
    }
