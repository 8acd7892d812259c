"""Differences between TensorRT 10.3 to 11.x and TensorRT-RTX.

The module (``tensorrt`` or ``tensorrt_rtx``) is always an argument. Flags are looked up by name, because their values
differ between versions. The error for a missing name says which versions have it. The names in each version's bindings
are recorded in ``tests/runtimes/tensorrt/surfaces``.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from scconv_deploy.errors import MissingRuntimeError, UsageError
from scconv_deploy.system.backends import BACKENDS, Backend
from scconv_deploy.system.gpu import gpus

OLDEST = (10, 3)
FUNCTIONS_BEHIND_PLUGINS = (10, 7)
"""First TensorRT version that prefers a plugin over a model-local function of the same name. Earlier versions also bind
a function's inputs wrongly when a formal parameter's name equals an outer tensor's."""


@dataclass(frozen=True)
class Feature:
    """Feature that some versions, or TensorRT-RTX, lack.

    Attributes:
        option: option on the command line.
        attributes: dotted names in the module, all of which the feature needs.
        versions: versions that have the feature, as text.
        in_rtx: why TensorRT-RTX lacks the feature, "" if it has it (its bindings may show the name all the same).
        rtx_needs_gpu: why TensorRT-RTX needs a GPU for the feature, "" if it does not.
    """

    option: str
    attributes: tuple[str, ...]
    versions: str = "tensorrt 10.3 and later"
    in_rtx: str = ""
    rtx_needs_gpu: str = ""


_BOTH = "tensorrt 10.3 and later, and tensorrt-rtx"
FEATURES: dict[str, Feature] = {
    "tf32": Feature("--tf32", ("BuilderFlag.TF32",), _BOTH),
    "strip": Feature(
        "--strip", ("BuilderFlag.STRIP_PLAN",), _BOTH,
        rtx_needs_gpu="stripping implies refitting, which compiles kernels for a GPU",
    ),
    "refit": Feature(
        "--refit", ("BuilderFlag.REFIT",), _BOTH, rtx_needs_gpu="refitting compiles kernels for a GPU"
    ),
    "optimization_level": Feature("--optimization-level", ("IBuilderConfig.builder_optimization_level",), _BOTH),
    "workspace_bytes": Feature(
        "--workspace", ("IBuilderConfig.set_memory_pool_limit", "MemoryPoolType.WORKSPACE"), _BOTH
    ),
    "timing_cache": Feature(
        "--timing-cache", ("IBuilderConfig.create_timing_cache", "IBuilderConfig.set_timing_cache"),
        in_rtx="it times nothing when it builds: its kernels are chosen where the engine runs",
    ),
    "ampere+": Feature(
        "--hardware-compatibility ampere+",
        ("IBuilderConfig.hardware_compatibility_level", "HardwareCompatibilityLevel.AMPERE_PLUS"),
        in_rtx="use --target: one engine holds several compute capabilities",
    ),
    "same-cc": Feature(
        "--hardware-compatibility same-cc",
        ("IBuilderConfig.hardware_compatibility_level", "HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY"),
        "tensorrt 10.9 and later",
        in_rtx="use --target: one engine holds several compute capabilities",
    ),
    "version_compatible": Feature(
        "--version-compatible", ("BuilderFlag.VERSION_COMPATIBLE",),
        in_rtx="it comes without the lean runtime that this needs",
    ),
    "plugin": Feature(
        "--plugin", ("IPluginRegistry.load_library", "IPluginRegistry.get_creator"), _BOTH
    ),
    "serialize_plugin": Feature(
        "--serialize-plugin", ("IBuilderConfig.plugins_to_serialize",), _BOTH
    ),
    "debug_tensors": Feature(
        "--debug-tensors",
        ("INetworkDefinition.mark_debug", "IExecutionContext.set_debug_listener",
         "IExecutionContext.set_tensor_debug_state"),
        _BOTH,
    ),
    "compute_capabilities": Feature(
        "--target smNN", ("IBuilderConfig.set_compute_capability", "ComputeCapability"), "tensorrt-rtx 1.0 and later"
    ),
}  # fmt: skip


def load_module(backend: Backend) -> ModuleType:
    """Import the library of a backend.

    Raises:
        MissingRuntimeError: the package is not installed, its libraries do not load, or TensorRT is older than 10.3.
    """
    facts = BACKENDS[backend]
    try:
        module = importlib.import_module(facts.module)
    except (ImportError, OSError) as error:
        reason = "is not installed" if isinstance(error, ModuleNotFoundError) else f"does not load: {error}"
        raise MissingRuntimeError(f"{facts.title} {reason}.", f"{facts.install}.") from error
    if backend == "tensorrt" and release(module.__version__) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise MissingRuntimeError(f"TensorRT {module.__version__} is older than {oldest}.", f"{facts.install}.")
    return module


def release(version: str) -> tuple[int, ...]:
    """Numbers of a version for comparison, without a suffix (``.dev0``, ``+cuda12``)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found is not None else ()


def lookup(module: Any, dotted: str) -> Any:
    """Look up a dotted name in a module (AttributeError if this version lacks it)."""
    value = module
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


def has(module: Any, feature: Feature) -> bool:
    """Whether a module has every name that a feature needs."""
    try:
        for dotted in feature.attributes:
            lookup(module, dotted)
    except AttributeError:
        return False
    return True


def require(module: Any, backend: Backend, name: str) -> None:
    """Refuse an option that this version lacks.

    Raises:
        UsageError: names the versions that have the option.
    """
    feature = FEATURES[name]
    if backend == "tensorrt-rtx" and feature.in_rtx:
        raise UsageError(
            f"TensorRT-RTX has no {feature.option}: {feature.in_rtx}.", f"Versions that have it: {feature.versions}."
        )
    if not has(module, feature):
        raise UsageError(
            f"{BACKENDS[backend].title} {module.__version__} has no {feature.option}.",
            f"Versions that have it: {feature.versions}.",
        )


def require_gpu(backend: Backend, why: str, remedy: str) -> None:
    """Raise MissingRuntimeError if this machine has no GPU; call it before any work is done."""
    if not gpus():
        raise MissingRuntimeError(
            f"{BACKENDS[backend].title} needs a GPU here: {why}. NVIDIA's driver lists none.", remedy
        )
