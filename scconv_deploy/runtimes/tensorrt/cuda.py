"""CUDA runtime through ctypes: memory, streams, events and graphs. Standard library and NumPy only.

It also runs on the device, which has no torch. Every call is checked. Every object is a context manager that releases
what it holds. A release that fails while an exception is raised does not hide that exception.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.system.gpu import driver_cuda

_TO_DEVICE, _TO_HOST = 1, 2  # cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost
_NON_BLOCKING = 1  # cudaStreamNonBlocking: does not wait for the legacy default stream
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal: other threads may allocate while this one captures
_NO_DRIVER = (35, 100)  # cudaErrorInsufficientDriver, cudaErrorNoDevice
_OUT_OF_MEMORY = 2
_MAJORS = (13, 12, 11)

_POINTER, _SIZE, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cudaMalloc": (ctypes.POINTER(_POINTER), _SIZE),
    "cudaFree": (_POINTER,),
    "cudaMemcpyAsync": (_POINTER, _POINTER, _SIZE, _INT, _POINTER),
    "cudaMemGetInfo": (ctypes.POINTER(_SIZE), ctypes.POINTER(_SIZE)),
    "cudaStreamCreateWithFlags": (ctypes.POINTER(_POINTER), ctypes.c_uint),
    "cudaStreamSynchronize": (_POINTER,),
    "cudaStreamDestroy": (_POINTER,),
    "cudaStreamBeginCapture": (_POINTER, _INT),
    "cudaStreamEndCapture": (_POINTER, ctypes.POINTER(_POINTER)),
    "cudaGraphInstantiateWithFlags": (ctypes.POINTER(_POINTER), _POINTER, ctypes.c_ulonglong),
    "cudaGraphLaunch": (_POINTER, _POINTER),
    "cudaGraphExecDestroy": (_POINTER,),
    "cudaGraphDestroy": (_POINTER,),
    "cudaEventCreate": (ctypes.POINTER(_POINTER),),
    "cudaEventRecord": (_POINTER, _POINTER),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), _POINTER, _POINTER),
    "cudaEventDestroy": (_POINTER,),
    "cudaRuntimeGetVersion": (ctypes.POINTER(_INT),),
}
"""Function signatures, the same in CUDA 11.4 to 13. ``cudaGraphInstantiate`` changed, ``WithFlags`` did not."""


class CudaError(MissingRuntimeError):
    """Error of a CUDA runtime call.

    Attributes:
        code: the ``cudaError_t``.
    """

    def __init__(self, message: str, remedy: str, code: int) -> None:
        super().__init__(message, remedy)
        self.code = code


class Cuda:
    """Checked functions of the CUDA runtime.

    Args:
        library: libcudart.

    Raises:
        MissingRuntimeError: the library lacks a function: it is older than CUDA 11.4, or no CUDA runtime.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name, None)
            if function is None:
                raise MissingRuntimeError(
                    f"{library._name} has no {name}: expected the CUDA runtime 11.4 or later.", _remedy()
                )
            function.argtypes, function.restype = arguments, _INT
        library.cudaGetErrorString.argtypes, library.cudaGetErrorString.restype = (_INT,), ctypes.c_char_p
        self._library = library

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function (CudaError unless it returns cudaSuccess)."""
        code = getattr(self._library, name)(*arguments)
        if code == 0:
            return
        text = (self._library.cudaGetErrorString(code) or b"unknown error").decode(errors="replace")
        raise CudaError(f"{name} failed: {text} (error {code}).", _what_to_do(code), code)

    def read(self, array: np.ndarray, address: int, stream: int) -> None:
        """Copy device memory to a C-contiguous array in the turn of a stream of the library's, and wait for it."""
        if array.nbytes:
            self.call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, _TO_HOST, stream)
        self.call("cudaStreamSynchronize", stream)

    @property
    def release(self) -> tuple[int, int]:
        """CUDA runtime version, e.g. ``(12, 6)``; needs no driver."""
        found = _INT()
        self.call("cudaRuntimeGetVersion", ctypes.byref(found))
        return found.value // 1000, found.value % 1000 // 10

    @property
    def version(self) -> str:
        """CUDA runtime version as text, ``12.6``."""
        return ".".join(map(str, self.release))

    def memory_bytes(self) -> tuple[int, int]:
        """Free and total memory of the current device, in bytes."""
        free, total = _SIZE(), _SIZE()
        self.call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value


class _Handle:
    """CUDA object that must be released once."""

    def __init__(self, cuda: Cuda, free: str) -> None:
        self._cuda, self._free = cuda, free
        self._pointer = _POINTER()

    @property
    def address(self) -> int:
        """Pointer as an integer; 0 after release."""
        return self._pointer.value or 0

    def close(self) -> None:
        """Release the object; a second call does nothing."""
        pointer, self._pointer = self._pointer, _POINTER()
        if pointer.value:
            self._cuda.call(self._free, pointer)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        close_all([self], error)


class Buffer(_Handle):
    """Device memory.

    Args:
        size_bytes: size; 0 allocates one byte, so that there is an address.
    """

    def __init__(self, cuda: Cuda, size_bytes: int) -> None:
        super().__init__(cuda, "cudaFree")
        self.size_bytes = size_bytes
        cuda.call("cudaMalloc", ctypes.byref(self._pointer), max(size_bytes, 1))

    def upload(self, array: np.ndarray, stream: Stream) -> None:
        """Copy a C-contiguous array of this size to the device; keep the array until the stream is synchronized."""
        self._copy(self.address, array.ctypes.data, array, _TO_DEVICE, stream)

    def download(self, array: np.ndarray, stream: Stream) -> None:
        """Copy to a C-contiguous array of this size; the values are there once the stream is synchronized."""
        self._copy(array.ctypes.data, self.address, array, _TO_HOST, stream)

    def _copy(self, to: int, source: int, array: np.ndarray, kind: int, stream: Stream) -> None:
        if array.nbytes != self.size_bytes or not array.flags.c_contiguous:
            raise ValueError(f"expected {self.size_bytes} bytes in a row, found {array.nbytes}")
        if array.nbytes:
            self._cuda.call("cudaMemcpyAsync", to, source, array.nbytes, kind, stream.address)


class Stream(_Handle):
    """CUDA stream, non-blocking."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__(cuda, "cudaStreamDestroy")
        cuda.call("cudaStreamCreateWithFlags", ctypes.byref(self._pointer), _NON_BLOCKING)

    def synchronize(self) -> None:
        """Wait for all work on the stream; raise errors of earlier launches."""
        self._cuda.call("cudaStreamSynchronize", self._pointer)

    def capture(self, work: Callable[[], None]) -> Graph:
        """Capture the launches of ``work`` on this stream as a graph, without running them."""
        self._cuda.call("cudaStreamBeginCapture", self._pointer, _THREAD_LOCAL)
        graph = _POINTER()
        try:
            work()
        except BaseException:
            # end the capture in any case; the first error is the one to raise
            self._cuda._library.cudaStreamEndCapture(self._pointer, ctypes.byref(graph))
            if graph.value:
                self._cuda._library.cudaGraphDestroy(graph)
            raise
        self._cuda.call("cudaStreamEndCapture", self._pointer, ctypes.byref(graph))
        try:
            return Graph(self._cuda, graph)
        finally:
            self._cuda.call("cudaGraphDestroy", graph)


class Graph(_Handle):
    """CUDA graph: launches that were captured once and are replayed as one."""

    def __init__(self, cuda: Cuda, graph: ctypes.c_void_p) -> None:
        super().__init__(cuda, "cudaGraphExecDestroy")
        cuda.call("cudaGraphInstantiateWithFlags", ctypes.byref(self._pointer), graph, 0)

    def launch(self, stream: Stream) -> None:
        """Launch the graph on a stream."""
        self._cuda.call("cudaGraphLaunch", self._pointer, stream.address)


class Event(_Handle):
    """CUDA event: a point on a stream, with the device's time."""

    def __init__(self, cuda: Cuda) -> None:
        super().__init__(cuda, "cudaEventDestroy")
        cuda.call("cudaEventCreate", ctypes.byref(self._pointer))

    def record(self, stream: Stream) -> None:
        """Record the event after the work on the stream so far."""
        self._cuda.call("cudaEventRecord", self._pointer, stream.address)

    def seconds_since(self, earlier: Event) -> float:
        """Seconds on the device between two events that were both reached."""
        milliseconds = ctypes.c_float()
        self._cuda.call("cudaEventElapsedTime", ctypes.byref(milliseconds), earlier.address, self._pointer)
        return milliseconds.value * 1e-3


def close_all(handles: Sequence[Any], on_its_way: BaseException | None = None) -> None:
    """Release all handles in order, even if one fails; raise the first failure unless an exception is on its way."""
    failure: CudaError | None = None
    for handle in handles:
        try:
            handle.close()
        except CudaError as error:
            failure = failure or error
    if failure is not None and on_its_way is None:
        raise failure


# --- finding libcudart --------------------------------------------------------------------------------------------


@functools.cache
def load_cuda() -> Cuda:
    """Load the CUDA runtime: the system's, one below CUDA_HOME, or one in a wheel of torch or NVIDIA.

    A runtime of a newer major version than the driver's cannot run anything; it is loaded only if there is no other.

    Raises:
        MissingRuntimeError: no CUDA runtime was found, or it is too old.
    """
    known = driver_cuda()
    newer: Cuda | None = None
    for candidate in candidates():
        try:
            library = ctypes.CDLL(candidate)
        except OSError:  # missing, or for another system: try the next one
            continue
        cuda = Cuda(library)
        if known is None or cuda.release[0] <= known[0]:
            return cuda
        newer = newer or cuda
    if newer is not None:
        return newer
    raise MissingRuntimeError("The CUDA runtime (libcudart) was not found.", _remedy())


def candidates() -> Iterator[str]:
    """Names and paths of libcudart to try, the system's first."""
    windows = sys.platform == "win32"
    folders: tuple[str, ...]
    if windows:
        yield from (f"cudart64_{n}.dll" for n in ("13", "12", "110"))
        pattern, folders = "cudart64_*.dll", ("bin", "bin/x64")
    else:
        yield from (f"libcudart.so.{n}" for n in ("13", "12", "11.0"))
        pattern, folders = "libcudart.so*", ("lib64", "lib", "targets/*/lib")
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    homes += ["/usr/local/cuda", *(f"/usr/local/cuda-{major}" for major in _MAJORS)]
    for home in filter(None, homes):
        for folder in folders:
            yield from _files(Path(home), f"{folder}/{pattern}")
    for package in ("nvidia", "torch"):
        spec = importlib.util.find_spec(package)  # does not import it
        for root in (spec.submodule_search_locations or ()) if spec is not None else ():
            yield from _files(Path(root), f"*/{folders[0] if windows else 'lib'}/{pattern}")
            yield from _files(Path(root), f"lib/{pattern}")


def _files(root: Path, pattern: str) -> list[str]:
    return [str(path) for path in sorted(root.glob(pattern), reverse=True)] if root.is_dir() else []


def _remedy() -> str:
    return (
        "Set CUDA_HOME, or install it: pip install nvidia-cuda-runtime (12: nvidia-cuda-runtime-cu12); on Jetson: "
        "apt install nvidia-jetpack."
    )


def _what_to_do(code: int) -> str:
    if code in _NO_DRIVER:
        return "Run this on a machine with an NVIDIA GPU and a driver that knows this CUDA."
    if code == _OUT_OF_MEMORY:
        return "Give smaller inputs, or free the GPU."
    return "The GPU's state may be lost; start again, and see the driver's log if it repeats."
