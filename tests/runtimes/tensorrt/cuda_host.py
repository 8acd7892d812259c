"""``cuda_on_host.cpp`` compiled: a CUDA runtime for tests, whose device is the host."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from scconv_deploy.runtimes.tensorrt.cuda import Cuda

SOURCE = Path(__file__).parent / "cuda_on_host.cpp"
KERNEL = ctypes.CFUNCTYPE(ctypes.c_int)


class HostCuda:
    """The library, and what the tests ask of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = library = ctypes.CDLL(str(path))
        library.host_calls.restype = ctypes.c_char_p
        library.host_launch.argtypes = (ctypes.c_void_p, KERNEL)
        self.cuda = Cuda(library)
        self._kernels: list = []  # a graph may launch them again

    def launch(self, stream: int, kernel) -> None:
        """Put a Python function onto a stream."""
        self._kernels.append(KERNEL(lambda: kernel() or 0))
        assert self._library.host_launch(stream, self._kernels[-1]) == 0

    def calls(self) -> list[str]:
        """The functions called since the last time."""
        return self._library.host_calls().decode().split()

    def fail(self, name: str = "", code: int = 1) -> None:
        """Let a function fail from now on; none without a name."""
        self._library.host_fail(name.encode(), code)

    @property
    def live(self) -> int:
        """Everything that was made and not given back."""
        return self._library.host_live()


def compile_host_cuda(folder: Path) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    target = folder / "libcudart_on_host.so"
    flags = ("-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-fno-gnu-unique")
    built = subprocess.run([compiler, *flags, str(SOURCE), "-o", str(target)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return target
