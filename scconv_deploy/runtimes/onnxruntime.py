"""Runner of ONNX models in ONNX Runtime."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime

from scconv_deploy.errors import IntegrityError, MissingRuntimeError, ModelError
from scconv_deploy.runtimes.timing import LayerTime, layer_times
from scconv_deploy.system.environment import bound_of_threads
from scconv_deploy.trt_plugins.elf import read_library

CPU = "CPUExecutionProvider"
Optimization = Literal["none", "basic", "extended", "all"]
_KERNEL = "_kernel_time"
"""End of a node's name in the profiler's file."""
_LEVELS: dict[Optimization, Any] = {
    "none": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


@dataclass(frozen=True)
class RuntimeOptions:
    """Settings of ONNX Runtime for one model.

    Attributes:
        provider: name of the execution provider, in any case, with or without ``ExecutionProvider`` (``cuda``).
        threads: threads within an operator; 0 takes ``OMP_NUM_THREADS``, as PyTorch does, or leaves the number to ONNX
            Runtime.
        optimization: level of graph optimization.
        profile: where the file of its profiler begins (it adds a time and ``.json``); None runs without.
        operators: library of custom operators that take the place of functions of the file, on the CPU; None without.
    """

    provider: str = CPU
    threads: int = 0
    optimization: Optimization = "all"
    profile: Path | None = None
    operators: Path | None = None

    def resolved_provider(self) -> str:
        """Full name of the installed provider (MissingRuntimeError if it is not installed)."""
        installed = onnxruntime.get_available_providers()
        wanted = self.provider.lower().removesuffix("executionprovider")
        for name in installed:
            if name.lower().removesuffix("executionprovider") == wanted:
                return name
        raise MissingRuntimeError(
            f"ONNX Runtime has no {self.provider} here.",
            f"Installed: {', '.join(installed)}.",
        )


class OnnxRuntimeRunner:
    """Runner of an ONNX model in ONNX Runtime.

    Args:
        model: model, below 2 GiB.

    Raises:
        MissingRuntimeError: the provider is not installed, or cannot start here.
        IntegrityError: the library of operators cannot be loaded.
        ModelError: ONNX Runtime refuses the model, or (in ``run``) its inputs.
    """

    name = "onnxruntime"

    def __init__(self, model: onnx.ModelProto, options: RuntimeOptions = RuntimeOptions()) -> None:
        provider = options.resolved_provider()
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = 4  # errors are raised; warnings of the optimiser do not concern the user
        settings.intra_op_num_threads = options.threads or bound_of_threads()
        settings.graph_optimization_level = _LEVELS[options.optimization]
        if options.profile is not None:
            settings.enable_profiling, settings.profile_file_prefix = True, str(options.profile)
        if options.operators is not None:
            _register(settings, options.operators)
        # spinning threads of idle sessions cost the running one a tenth of its time (measured)
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        _share_memory()
        settings.add_session_config_entry("session.use_env_allocators", "1")
        # TF32 has 10 bits of mantissa: it is not float32
        chosen: Any = (provider, {"use_tf32": "0"}) if provider == "CUDAExecutionProvider" else provider
        providers = [chosen] if provider == CPU else [chosen, CPU]
        try:
            self._session = onnxruntime.InferenceSession(model.SerializeToString(), settings, providers=providers)
        except Exception as error:  # onnxruntime's exceptions share no public base class
            raise ModelError(
                f"ONNX Runtime refuses the model: {_one_line(error)}", "Export it again, or with another --opset."
            ) from error
        if provider not in self._session.get_providers():  # ONNX Runtime falls back to the CPU silently
            raise MissingRuntimeError(
                f"{provider} is installed but does not start here; ONNX Runtime would use the CPU.",
                "Install the libraries that it needs, or leave --provider out.",
            )
        self.inputs = tuple(i.name for i in self._session.get_inputs())
        self.outputs = tuple(o.name for o in self._session.get_outputs())

    def __enter__(self) -> OnnxRuntimeRunner:
        return self

    def __exit__(self, *exc: object) -> None:
        del self._session

    def run(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run once on arrays by name; return the outputs by name."""
        try:
            values = self._session.run(list(self.outputs), dict(tensors))
        except Exception as error:  # see above
            raise ModelError(
                f"ONNX Runtime cannot run the model: {_one_line(error)}", "Give the inputs that it was exported for."
            ) from error
        return dict(zip(self.outputs, values, strict=True))

    def end_profiling(self) -> Path:
        """Write the profiler's file, and return its path; only with ``profile`` in the options."""
        return Path(self._session.end_profiling())


def profile_layers(
    model: onnx.ModelProto, options: RuntimeOptions, tensors: Mapping[str, np.ndarray], rounds: int, warmup: int
) -> tuple[LayerTime, ...]:
    """Times of the nodes of an optimised model on the CPU, from a session of its own under ONNX Runtime's profiler.

    Args:
        rounds, warmup: number of runs that count, and of runs before them.
    """
    with tempfile.TemporaryDirectory() as folder:
        profiled = replace(options, profile=Path(folder) / "run")
        with OnnxRuntimeRunner(model, profiled) as runner:
            for _ in range(warmup + rounds):
                runner.run(tensors)
            events = json.loads(runner.end_profiling().read_bytes())
    runs: list[list[tuple[str, str, float]]] = [[]]
    for event in events:  # those of a run's nodes, then the run's own
        if event["cat"] == "Node" and event["name"].endswith(_KERNEL):
            name = event["name"].removesuffix(_KERNEL)
            runs[-1].append((name, event["args"]["op_name"], event["dur"] * 1e-3))
        elif event["name"] == "model_run":
            runs.append([])
    return layer_times(runs[warmup : warmup + rounds])


def _register(settings: Any, library: Path) -> None:
    """Add the operators of a library to a session's settings."""
    read_library(library)  # dlopen of a truncated one ends the process
    try:
        settings.register_custom_ops_library(str(library.absolute()))
    except Exception as error:  # as above
        raise IntegrityError(
            f"ONNX Runtime cannot load {library}: {_one_line(error)}",
            "Build it again: scconv-deploy plugin build --cpu",
        ) from error


@cache
def _share_memory() -> None:
    """Share one memory arena among the sessions of this process; several are open at once and run in turn.

    Measured on ScConv-ResNet-50 with 8 images: with an arena each, fresh memory pages cost 1.4 times the time.
    """
    memory = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(memory, onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1}))


def _one_line(error: BaseException) -> str:
    """Message of an error in one line; ONNX Runtime puts what was expected and found on later lines."""
    return " ".join(str(error).split()) or type(error).__name__


def lazily(proto: onnx.ModelProto) -> Callable[[dict[str, np.ndarray]], object]:
    """Function that runs a model; if the model does not load, its first call raises the ModelError."""
    try:
        return OnnxRuntimeRunner(proto).run
    except ModelError as error:
        refusal = error

        def refuse(feed: dict[str, np.ndarray]) -> object:
            raise refusal

        return refuse
