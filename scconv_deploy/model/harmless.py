"""Harmless values that training scripts save beside weights, for ``weights_only`` reads: numbers, arrays, paths.

torch.load refuses every class that it does not know. A pickle may name those of :data:`SAFE`, and gets what stands
here: NumPy's own functions are never called with what a file says, but for a number of plain bytes.
"""

from __future__ import annotations

import argparse
import datetime
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np

_PLAIN = "fiubcSU"
"""``dtype.kind`` of what is read: floats, integers, booleans, complex numbers, bytes and text."""


class _Kind:
    """A pickled ``numpy.dtype``: a code such as ``f8``, and the order of its bytes."""

    def __init__(self, code: object, align: object = False, copy: object = True) -> None:
        self._code, self._order = str(code), "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = str(state[1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type (UnpicklingError, in torch's words for a class, if it is none of numbers or text)."""
        found = np.dtype(self._code)
        if found.kind not in _PLAIN:
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype[{self._code}] was not an allowed global")
        return found if self._order in ("|", "=") else found.newbyteorder(self._order)  # type: ignore[arg-type]


def _scalar(kind: _Kind, data: bytes | str) -> Any:
    """A NumPy scalar."""
    held = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(held, kind.dtype, 1)[0]


class _Array(np.ndarray):
    """A NumPy array of numbers, filled by its state."""

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, by_columns, data = state
        held = data.encode("latin1") if isinstance(data, str) else data
        array = np.frombuffer(held, kind.dtype).reshape(shape, order="F" if by_columns else "C")
        plain: Any = (1, array.shape, array.dtype, False, array.tobytes())
        super().__setstate__(plain)


def _empty(*_: object) -> _Array:
    return np.ndarray.__new__(_Array, (0,))


def _no_bytes() -> bytes:
    """The data of an empty array, as old pickle protocols write them."""
    return b""


def _path(*parts: str) -> str:
    return "/".join(parts)


_NUMPY = ("numpy._core.multiarray", "numpy.core.multiarray")  # NumPy 2 and 1
_PATHS = ("PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath", "PurePath")

SAFE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,  # only keeps what it is given
    datetime.datetime,
    datetime.timedelta,
    (_Kind, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_scalar, f"{module}.scalar") for module in _NUMPY),
    *((_empty, f"{module}._reconstruct") for module in _NUMPY),
    (_no_bytes, "builtins.bytes"),
    *((_path, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in _PATHS),
]
"""For ``torch.serialization.safe_globals``: what stands for each name."""
