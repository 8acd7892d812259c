"""``scconv-deploy bench``: time artifacts and models against each other, in turns, on the same inputs."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch

from scconv_deploy.errors import MissingRuntimeError, ModelError, first_line
from scconv_deploy.gate.threads import threads
from scconv_deploy.graph.inputs import random_array
from scconv_deploy.graph.types import described_precision
from scconv_deploy.model import signature as signatures
from scconv_deploy.model.inputs import InputSpec
from scconv_deploy.model.load import load_with_record
from scconv_deploy.model.spec import ModelSpec, source_kind
from scconv_deploy.records.stage import Progress, silent
from scconv_deploy.runtimes.onnxruntime import CPU, OnnxRuntimeRunner, RuntimeOptions, profile_layers
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact
from scconv_deploy.runtimes.tensorrt.runner import TensorRTRunner
from scconv_deploy.runtimes.timing import LayerTime, latency
from scconv_deploy.system.environment import platform_facts
from scconv_deploy.system.gpu import gpus
from scconv_deploy.system.progress_lines import Notice
from scconv_deploy.version import __version__
from scconv_deploy.workflows.bench_options import (
    BenchOptions,
    Content,
    check_options,
    check_use,
    inputs_of,
    read,
    shapes_of,
)
from scconv_deploy.workflows.fused_cpu import is_fused, operators_of
from scconv_deploy.workflows.subject import Bundle, Engine, Model, OnnxFile, subject_of

_PAGE = "/proc/self/statm"


@dataclass(frozen=True)
class BenchRow:
    """Measurements of one subject.

    Attributes:
        p50_ms, p90_ms, p99_ms, mean_ms: wall clock of one run, without copies to and from the device.
        items_per_s: samples of one run (axis 0) divided by the mean time.
        device_p50_ms: time between two events on the stream; None without a device.
        memory_bytes: growth of the memory that ``memory_of`` names (resident set of the process, or the device's) since
            before the subject was loaded; None if unknown.
        load_s: time from loading to ready for the first run.
        layers: times of its layers, the longest first, if they were asked for: from further runs, under a profiler.
        precision: type of an ONNX file's data, and how it is quantised; "" for others.
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
    layers: tuple[LayerTime, ...] = ()
    precision: str = ""


@dataclass(frozen=True)
class BenchResult:
    """Measurements of all subjects of one run, which took turns."""

    batch: int
    rounds: int
    warmup: int
    rows: tuple[BenchRow, ...]
    environment: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _Subject:
    """Subject that is ready to run: ``run`` runs it once and returns seconds on the device, if there is one.

    ``layers`` times its layers; None if this subject has none to show.
    """

    name: str
    kind: str
    items: int
    run: Callable[[], float | None]
    memory_bytes: int | None
    memory_of: Literal["process", "device"]
    load_s: float
    layers: Callable[[], tuple[LayerTime, ...]] | None = None
    precision: str = ""


def bench_artifacts(
    names: Sequence[str], options: BenchOptions, command: str = "", progress: Progress = silent
) -> BenchResult:
    """Time ONNX files, bundles, engines and models.

    Args:
        names: a path that ends in ``.onnx`` or ``.engine``, a bundle's folder, or a MODEL.

    Raises:
        UsageError: an unknown name, an open axis without a size, or an option that no subject uses.
        ModelError: a model cannot be made, or refuses its inputs.
        MissingRuntimeError: there is no GPU or library for an engine.
        IntegrityError: an artifact is not what its manifest says.
    """
    named = {name: subject_of(name) for name in names}
    check_options(named.values(), options)
    contents = {name: read(subject) for name, subject in named.items()}
    check_use(contents, options)
    with ExitStack() as stack:
        stack.enter_context(threads(options.threads))
        subjects: list[_Subject] = []
        for name in named:
            progress(f"loading {name}")
            subjects += _subjects(name, named[name], contents.pop(name), options, stack, progress)
        times, device_times = _measure(subjects, options, progress)
        rows = tuple(_row(s, times[s.name], device_times[s.name]) for s in subjects)
        if options.layers:  # last: a profiler would slow the timed runs
            rows = tuple(_with_layers(row, s, progress) for row, s in zip(rows, subjects, strict=True))
    return BenchResult(options.batch, options.rounds, options.warmup, rows, _environment(options, command))


def _subjects(
    name: str,
    subject: Model | OnnxFile | Engine | Bundle,
    content: Content,
    options: BenchOptions,
    stack: ExitStack,
    progress: Progress,
) -> list[_Subject]:
    if isinstance(content, EngineArtifact):
        graphs = (False, True) if options.cuda_graph else (False,)
        return [_engine(name, content, graph, options, stack) for graph in graphs]
    if content is not None:
        if not is_fused(options.provider):
            return [_onnx(name, content, options, stack)]
        library = operators_of(subject.path if isinstance(subject, Bundle) else None)
        options = replace(options, provider=CPU)
        return [_onnx(name, content, options, stack, operators) for operators in (None, library)]
    plain = _pytorch(name, options, False, progress)
    return [plain, _pytorch(name, options, True, silent)] if options.compiled else [plain]


def _onnx(
    name: str, model: onnx.ModelProto, options: BenchOptions, stack: ExitStack, operators: Path | None = None
) -> _Subject:
    before, start = _resident(), time.perf_counter()
    settings = RuntimeOptions(options.provider, options.threads, operators=operators)
    runner = stack.enter_context(OnnxRuntimeRunner(model, settings))
    shapes = shapes_of(inputs_of(model), options)
    dtypes = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in model.graph.input}
    feed = _feed(shapes, dtypes, options.seed)

    def run() -> None:
        runner.run(feed)

    run()
    memory = None if before is None else max(0, (_resident() or 0) - before)
    seconds = time.perf_counter() - start
    items = _items(shapes.values())
    where = "" if options.provider.lower().removesuffix("executionprovider") == "cpu" else f", {options.provider}"
    where += ", fused SRU" if operators is not None else ""

    def layers() -> tuple[LayerTime, ...]:
        return profile_layers(model, settings, feed, options.rounds, options.warmup)

    return _Subject(
        f"{name} (ONNX Runtime{where})", "onnxruntime", items, run, memory, "process", seconds,
        layers if options.layers else None,  # it would keep the model in memory
        described_precision(model),
    )  # fmt: skip


def _feed(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, Any], seed: int) -> dict[str, np.ndarray]:
    """Seeded random values for every input."""
    return {name: random_array(shape, dtypes[name], np.random.default_rng(seed)) for name, shape in shapes.items()}


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
    dtypes = {t.name: np.dtype(numpy_names.get(t.dtype, "float32")) for t in artifact.manifest.inputs}
    shapes = shapes_of(inputs_of(artifact), options)
    feed = _feed(shapes, dtypes, options.seed)
    runner.run(feed)
    memory = runner.device_memory_bytes + artifact.manifest.file_bytes
    label = f"{name} ({runner.name}{', CUDA graph' if graph else ''})"
    items = _items(shapes.values())

    def layers() -> tuple[LayerTime, ...]:
        return runner.profile_layers(feed, options.rounds, options.warmup)

    return _Subject(
        label, runner.name, items, runner.timed, memory, "device", time.perf_counter() - start,
        None if graph else layers,  # a captured graph runs the same layers, out of the profiler's sight
    )  # fmt: skip


def _plugin_of(artifact: EngineArtifact, options: BenchOptions) -> Path | None:
    """Path of the plugin, for an engine that was built with one."""
    return options.plugin if artifact.manifest.plugin_sha256 else None


def _pytorch(name: str, options: BenchOptions, compiled: bool, progress: Progress) -> _Subject:
    device = options.resolved_device
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingRuntimeError(
            "torch finds no CUDA device.", "Leave --device out, or install a CUDA build of torch."
        )
    before, start = _resident(), time.perf_counter()
    given = tuple(InputSpec.parse(text) for text in options.inputs)
    spec = replace(options.spec(name), inputs=given, seed=options.seed)
    if source_kind(spec.source) != "checkpoint":  # a checkpoint may know its inputs
        spec = spec.resolved()
    model, record = load_with_record(spec)
    spec = replace(spec, inputs=record.inputs).resolved()
    if not given:
        spec = replace(spec, inputs=tuple(replace(i, shape=(options.batch, *i.shape[1:])) for i in spec.inputs))
    if record.notice:
        progress(Notice(record.notice))
    signature = signatures.from_specs(model, spec.inputs, (), options.seed)
    allocated = 0
    if device == "cuda":
        torch.cuda.init()  # for the counters below
        torch.cuda.reset_peak_memory_stats()  # drop the peak of earlier subjects
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

    _first_run(run, spec, compiled)
    seconds = time.perf_counter() - start
    name, how, items = spec.label, "torch.compile" if compiled else "PyTorch", _items(i.shape for i in spec.inputs)
    if device == "cuda":
        grown = torch.cuda.max_memory_allocated() - allocated
        return _Subject(f"{name} ({how})", how, items, run, grown, "device", seconds)
    memory = None if before is None else max(0, (_resident() or 0) - before)
    return _Subject(f"{name} ({how})", how, items, run, memory, "process", seconds)


def _first_run(run: Callable[[], object], spec: ModelSpec, compiled: bool) -> None:
    """Run once before timing: compiles, and shows whether the inputs fit."""
    try:
        run()
    except RuntimeError as error:  # from torch, also if torch.compile finds no compiler
        reason = first_line(error)
        if compiled:  # uncompiled, it ran before
            raise MissingRuntimeError(
                f"torch.compile cannot compile {spec.label}: {reason}",
                "Leave --compile out; on a CPU it needs a C++ compiler (CXX), for example g++.",
            ) from error
        shapes = ", ".join(map(str, spec.inputs))
        raise ModelError(f"{spec.label} refuses its inputs ({shapes}): {reason}", "Check --input.") from error


def _resident() -> int | None:
    """Resident set of this process in bytes; None without /proc."""
    try:
        pages = int(Path(_PAGE).read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def _measure(
    subjects: Sequence[_Subject], options: BenchOptions, progress: Progress
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of every subject by round: on the host's clock, and on the device if there is one."""
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
    """Number of samples of one run: axis 0 of the first input that has one."""
    return next((shape[0] for shape in shapes if shape), 1)


def _row(subject: _Subject, seconds: Sequence[float], device: Sequence[float]) -> BenchRow:
    found = latency(seconds, device)
    return BenchRow(
        subject.name, subject.kind, found.p50_ms, found.p90_ms, found.p99_ms, found.mean_ms,
        subject.items / (found.mean_ms * 1e-3), found.device_p50_ms,
        subject.memory_bytes, subject.memory_of, subject.load_s, precision=subject.precision,
    )  # fmt: skip


def _with_layers(row: BenchRow, subject: _Subject, progress: Progress) -> BenchRow:
    if subject.layers is None:
        return row
    progress(f"timing the layers of {subject.name}")
    return replace(row, layers=subject.layers())


def _environment(options: BenchOptions, command: str) -> dict[str, str]:
    return {
        "command": command,
        "scconv-deploy": __version__,
        **platform_facts(),
        "torch": version("torch"),
        "onnxruntime": version("onnxruntime"),
        "gpu": ", ".join(map(str, gpus())) or "none",
        "threads": str(options.threads or "default"),
        "seed": str(options.seed),
    }
