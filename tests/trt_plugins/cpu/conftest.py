"""The CPU library, bound with ctypes."""

from __future__ import annotations

import pytest

from scconv_deploy.trt_plugins.cpu.library import SruCpuLibrary


@pytest.fixture(scope="session")
def cpu_library(cpu_path) -> SruCpuLibrary:
    return SruCpuLibrary(cpu_path)
