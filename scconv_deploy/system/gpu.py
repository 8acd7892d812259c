"""The GPUs of this machine, asked of NVIDIA's driver itself: no CUDA build of torch is needed to know them."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


@dataclass(frozen=True)
class Gpu:
    """A device that CUDA can use: its name and compute capability, ``8.9`` for example."""

    name: str
    compute_capability: str

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.compute_capability})"


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that the driver lists; empty where there is no driver or no device."""
    driver, count = _driver(), ctypes.c_int()
    if driver is None or driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_describe(driver, ordinal) for ordinal in range(count.value))


def driver_cuda() -> tuple[int, int] | None:
    """The newest CUDA that the driver knows, ``(12, 6)`` for example; None where there is no driver.

    What was made for a newer major version, a library or a program of nvcc's, does not run on it.
    """
    driver, found = _driver(), ctypes.c_int()
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(found)) != 0:
        return None
    return found.value // 1000, found.value % 1000 // 10


def _driver() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def _describe(driver: ctypes.CDLL, ordinal: int) -> Gpu:
    device, name, major, minor = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGet(ctypes.byref(device), ordinal)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    return Gpu(name.value.decode(errors="replace"), f"{major.value}.{minor.value}")
