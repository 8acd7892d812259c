"""What a run of the tests has made already, found again by everything that decides it.

An export takes seconds, most of them torch.export's, and hundreds of tests begin with one of a few small networks. What
is kept is bytes, so that no test sees another's edits, on disk, so that two workers share them.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor, nn

FOLDER: Path | None = None
"""One for all workers of a run; tests/conftest.py names it. Without one, nothing is kept."""


def key_of(*values: Any) -> str | None:
    """The SHA-256 of everything that the values hold; None if some of it has no name, as a lambda has none."""
    stream = io.BytesIO()
    try:
        _Key(stream).dump(values)
    except (pickle.PicklingError, AttributeError, RuntimeError, TypeError):
        return None
    return hashlib.sha256(stream.getvalue()).hexdigest()


class _Key(pickle.Pickler):
    """Writes what is never read again: tensors by their values, classes and functions by their names."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            array = value.detach().numpy()
            facts = (str(type(value)), value.requires_grad, str(array.dtype), array.shape, array.strides)
            return str, (facts, array.tobytes())
        if isinstance(value, nn.Module):  # a stand-in says that it is of another class
            return str, (_name(type(value)), _name(value.__class__)), dict(vars(value))
        if isinstance(value, (type, FunctionType, BuiltinFunctionType)) and value not in (str, _name):
            return str, (_name(value),)
        return NotImplemented


def _name(value: Any) -> str:
    """Of code that is the same throughout a run: in a file, but in no temporary one."""
    module = sys.modules.get(value.__module__ or "builtins")
    file = getattr(module, "__file__", None) or ""
    if "<" in value.__qualname__ or module is None or file.startswith(tempfile.gettempdir()):
        raise pickle.PicklingError(f"{value} is not known by its name")
    return f"{file or module.__name__}:{value.__qualname__}"


def once(key: str | None, make: Callable[[], Any]) -> Any:
    """What ``make`` returned for this key, now or before: a copy of its own for every call.

    While one worker makes it, another that wants the same waits.
    """
    if key is None or FOLDER is None:
        return make()
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / key
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            own = path.with_suffix(f".{os.getpid()}")
            own.write_bytes(pickle.dumps(make()))
            own.replace(path)
    return pickle.loads(path.read_bytes())  # noqa: S301  (this run wrote it)
