"""The fused SRU for CPUs in a use case: which library, out of a bundle, a file, the cache, or compiled now."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

from scconv_deploy.bundle.manifest import differing_files, read_manifest
from scconv_deploy.errors import IntegrityError, MissingRuntimeError, UsageError
from scconv_deploy.runtimes.onnxruntime import CPU
from scconv_deploy.trt_plugins.cpu.build import CPU_LIBRARY, build_cpu
from scconv_deploy.trt_plugins.cpu.check import is_cpu_library
from scconv_deploy.trt_plugins.elf import read_library
from scconv_deploy.verification.options import Checks

FUSED = "cpu+fused"
"""``--provider`` that stands for ONNX Runtime's CPU provider, without the library and with it."""


def is_fused(provider: str) -> bool:
    """Whether a provider is the CPU's with the fused SRU."""
    return provider.lower() == FUSED


def with_operators(checks: Checks, artifact: Path | None = None) -> Checks:
    """Options with the library in place of the provider ``cpu+fused``; others as they are.

    Args:
        artifact: what is judged; a bundle's own library is taken.

    Raises:
        MissingRuntimeError, BuildError: there is no library, and none can be compiled.
        IntegrityError: the bundle's library is not what its manifest says.
    """
    if not is_fused(checks.provider):
        return checks
    return replace(checks, provider=CPU, operators=operators_of(artifact))


def operators_of(artifact: Path | None) -> Path:
    """Library for an artifact: the one that a bundle carries, else one of the cache, compiled if there is none."""
    if artifact is None or not (artifact / CPU_LIBRARY).is_file():
        return build_cpu().path
    if differing_files(artifact, read_manifest(artifact), CPU_LIBRARY):
        raise IntegrityError(
            f"{artifact / CPU_LIBRARY} is not the library that the bundle's manifest describes, so it is not loaded.",
            "Copy the bundle again.",
        )
    return artifact / CPU_LIBRARY


def chosen(wanted: str) -> tuple[Path | None, str]:
    """Library for ``--plugin-cpu``, and a note if ``auto`` finds no compiler: then the function runs.

    Args:
        wanted: ``auto``, a file, or "" for none.

    Raises:
        UsageError: there is no such file, it is no library for CPUs, or of another architecture.
        IntegrityError: it is no shared library.
        BuildError: the compiler failed.
    """
    if not wanted:
        return None, ""
    if wanted == "auto":
        try:
            return build_cpu().path, ""
        except MissingRuntimeError as error:
            return None, f"the fused SRU for CPUs is left out, its function runs: {error.message} {error.remedy}"
    path = Path(wanted)
    if not path.is_file():
        raise UsageError(f"--plugin-cpu: {path} does not exist.", "Build it: scconv-deploy plugin build --cpu -o FILE")
    if not is_cpu_library(path):
        raise UsageError(f"--plugin-cpu: {path} is no library for CPUs.", "Build one: scconv-deploy plugin build --cpu")
    made, here = read_library(path).machine, platform.machine().replace("_", "-")
    if made != here:
        raise UsageError(
            f"--plugin-cpu: {path} is for {made}, this machine is {here}, where it cannot be judged.",
            "Build it on the device, and copy it there.",
        )
    return path, ""
