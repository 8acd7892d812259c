"""The CPU library, compiled once for all workers of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from scconv_deploy.trt_plugins.cpu.build import CPU_LIBRARY, build_cpu, source_digest
from scconv_deploy.trt_plugins.cpu.library import SruCpuLibrary
from tests.made_once import once


def compiled(folder: Path) -> Path:
    """The library in a folder; skip where no compiler is."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    path = folder / CPU_LIBRARY
    path.write_bytes(once(f"cpu-{source_digest()}", lambda: build_cpu(path).path.read_bytes()))
    return path


@pytest.fixture(scope="session")
def cpu_path(tmp_path_factory) -> Path:
    return compiled(tmp_path_factory.mktemp("cpu"))


@pytest.fixture(scope="session")
def cpu_library(cpu_path) -> SruCpuLibrary:
    return SruCpuLibrary(cpu_path)
