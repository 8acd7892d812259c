"""``--plugin auto``: the fused SRU for the GPUs that engines are built for, out of the cache or compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.exporters.tensorrt.options import BuildOptions
from scconv_deploy.system.gpu import gpus
from scconv_deploy.system.machine import Machine, find_nvcc, find_tensorrt_headers
from scconv_deploy.trt_plugins.build import BuildRequest, build, built_libraries
from scconv_deploy.trt_plugins.check import ENTRY_POINTS
from scconv_deploy.trt_plugins.elf import SharedLibrary, read_library

PORTABLE = ("80", "120")
"""Architectures for TensorRT-RTX's target ``portable``: machine code of 8.0 runs on 8.6 and 8.9, of 12.0 on 12.1
(CUDA C++ Programming Guide, binary compatibility: within a major version, upwards)."""

HEADERS = (
    "git clone --depth 1 --branch v10.3.0 https://github.com/NVIDIA/TensorRT, and set TENSORRT_INCLUDE_DIR to the "
    "folder include in it"
)
"""Commands that bring NVIDIA's headers, which no package on PyPI has."""


def with_plugin(
    wanted: Sequence[BuildOptions], progress: Callable[[str], None], machine: Machine | None = None
) -> list[BuildOptions]:
    """The options with the library in place of ``auto``; one library serves all of them.

    Raises:
        MissingRuntimeError: none in the cache fits, and none can be compiled: no nvcc, no header, no GPU to build for.
        BuildError: the compiler failed.
    """
    asking = [options for options in wanted if options.auto_plugin]
    if not asking:
        return list(wanted)
    machine = machine or Machine()
    architectures = tuple(dict.fromkeys(a for options in asking for a in architectures_of(options)))
    plugin = next(_fitting(architectures, machine), None)
    if plugin is None:
        progress("compiling the fused SRU")
        try:
            plugin = build(BuildRequest(architectures), machine=machine).path
        except MissingRuntimeError as error:
            found = find_nvcc(machine) is None or find_tensorrt_headers(machine) is not None
            remedy = error.remedy.rstrip(".") if found else HEADERS
            raise MissingRuntimeError(f"--plugin auto: {error.message}", f"{remedy}, or leave --plugin out.") from error
    return [
        replace(options, plugin=plugin, auto_plugin=False) if options.auto_plugin else options for options in wanted
    ]


def architectures_of(options: BuildOptions) -> tuple[str, ...]:
    """Compute capabilities, without the dot, of the GPUs that an engine is for; empty where none is known."""
    target = options.resolved_target
    if target == "portable":
        return PORTABLE
    if target == "local":
        return tuple(dict.fromkeys(gpu.compute_capability.replace(".", "") for gpu in gpus()))
    return tuple(part.removeprefix("sm") for part in target.split(","))


def _fitting(architectures: Iterable[str], machine: Machine) -> Iterator[Path]:
    """Plugins in the cache with machine code for all of these, newest first."""
    wanted = set(architectures)
    for path in built_libraries(machine):
        library = read_library(path)
        if wanted and wanted <= {c.replace(".", "") for c in library.cubins} and is_plugin(library):
            yield path


def is_plugin(library: SharedLibrary) -> bool:
    """Whether a library has a plugin's entry points; one for PyTorch alone has none."""
    return set(ENTRY_POINTS) <= library.exported
