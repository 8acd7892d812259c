"""Listener for an engine's debug tensors: copies each to the host while the engine runs. No run on a GPU yet.

The library calls it from ``execute_async_v3``, with the tensor's address and the stream; the content of the address is
valid during the call only (the bindings' docstring of ``process_debug_tensor``). So each call waits for the stream.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np

from scconv_deploy.runtimes.tensorrt.cuda import Cuda

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.argtypes, _pointer.restype = (ctypes.py_object, ctypes.c_char_p), ctypes.c_void_p


@dataclass
class Shown:
    """Debug tensors of one run.

    Attributes:
        tensors: arrays as stored, by name; bfloat16 as uint16.
        dtypes: the library's names of their types.
        failure: first exception in the listener, which must not cross the library.
    """

    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    failure: BaseException | None = None


def debug_listener(module: ModuleType, cuda: Cuda, stored: dict[str, Any]) -> Any:
    """Make an ``IDebugListener`` of the module, which fills its attribute ``shown``.

    Keep it as long as the execution context, and give it a new :class:`Shown` for each run.

    Args:
        stored: NumPy dtype of each TensorRT dtype on the host.
    """

    class Listener(module.IDebugListener):  # type: ignore[name-defined]
        def __init__(self) -> None:
            module.IDebugListener.__init__(self)
            self.shown = Shown()

        def process_debug_tensor(self, addr: Any, location: Any, type: Any, shape: Any, name: str, stream: int) -> bool:
            try:
                array = np.empty(tuple(shape), stored[type.name])
                address = addr if isinstance(addr, int) else _pointer(addr, None)
                if location.name == "HOST":
                    ctypes.memmove(array.ctypes.data, address, array.nbytes)
                else:
                    cuda.read(array, address, stream)
                self.shown.tensors[name], self.shown.dtypes[name] = array, type.name
            except BaseException as error:  # an interrupt too; raised again by the runner, after the library
                self.shown.failure = self.shown.failure or error
                return False
            return True

    return Listener()
