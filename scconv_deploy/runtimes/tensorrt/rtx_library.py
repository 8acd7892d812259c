"""The name ``libtensorrt_rtx.so``, under which TensorRT-RTX's ONNX parser looks for the plugin interface.

The parser opens ``libtensorrt_rtx.so`` as soon as a node's name meets a plugin's. NVIDIA's wheel ships
``libtensorrt_rtx.so.1`` alone, and the parser then ends the process (measured in 1.7.1). The system's loader takes a
library that is loaded already if its soname is the name that is looked for (ld.so(8)). So an empty library of that
soname, which needs the wheel's own, is loaded first: nothing is written into site-packages, and no environment variable
is asked for. Standard library only: it also runs on the device.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import sys
import tempfile
from pathlib import Path

NAME = "libtensorrt_rtx.so"
_MACHINES = {"x86_64": 62, "aarch64": 183}
_LOADED_AS = re.compile(rf"/({re.escape(NAME)}(?:\.\d+)+)$")
_NULL, _NEEDED, _HASH, _STRTAB, _SYMTAB, _STRSZ, _SYMENT, _SONAME = 0, 1, 4, 5, 6, 10, 11, 14  # gABI 4.1, Figure 5-10
_LOAD, _DYNAMIC, _GNU_STACK = 1, 2, 0x6474E551
_READ, _WRITE = 4, 2


@functools.cache
def resolve() -> str:
    """Make the name resolve in this process; the library itself must be loaded.

    Returns:
        "" where it resolves, else the reason in words.
    """
    if sys.platform != "linux" or os.uname().machine not in _MACHINES:
        return f"{NAME} is a name of Linux on x86-64 and aarch64"
    try:
        ctypes.CDLL(NAME, os.RTLD_NOLOAD | os.RTLD_LAZY)  # type: ignore[attr-defined, unused-ignore]
        return ""  # an installation that has the name
    except OSError:
        pass
    loaded = _loaded_as()
    if not loaded:
        return "TensorRT-RTX's library is not loaded"
    try:
        # a file that is gone once it is loaded; not in memory, for Pythons built for an old glibc have no memfd_create
        with tempfile.NamedTemporaryFile(suffix=".so") as file:
            file.write(empty_library(NAME, loaded, os.uname().machine))
            file.flush()
            ctypes.CDLL(file.name, os.RTLD_NOW | os.RTLD_GLOBAL)
    except OSError as error:
        return f"{NAME} cannot be made to stand for {loaded}: {error}"
    return ""


def _loaded_as() -> str:
    """The file name under which this process has the library, ``libtensorrt_rtx.so.1``; "" where it has not."""
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if found := _LOADED_AS.search(line):
            return found[1]
    return ""


def empty_library(soname: str, needed: str, machine: str) -> bytes:
    """A shared library without code that needs another one, as ELF64 (System V gABI 4.1).

    Args:
        machine: ``x86_64`` or ``aarch64``.
    """
    strings = b"\0" + soname.encode() + b"\0" + needed.encode() + b"\0"
    headers = 64 + 3 * 56
    symbols = headers  # one symbol, the undefined one, of 24 zero bytes
    table = symbols + 24
    names = table + 16
    dynamic = -(-(names + len(strings)) // 8) * 8
    entries = [
        (_SONAME, 1), (_NEEDED, 2 + len(soname)), (_HASH, table), (_STRTAB, names), (_SYMTAB, symbols),
        (_STRSZ, len(strings)), (_SYMENT, 24), (_NULL, 0),
    ]  # fmt: skip
    size = dynamic + 16 * len(entries)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, _MACHINES[machine], 1, 0, 64, 0, 0, 64, 56, 3, 64, 0, 0
    )
    segments = (
        (_LOAD, _READ | _WRITE, 0, size, 0x10000),  # the loader relocates the dynamic section in place
        (_DYNAMIC, _READ | _WRITE, dynamic, size - dynamic, 8),
        (_GNU_STACK, _READ | _WRITE, 0, 0, 16),  # without it the loader would make stacks executable
    )
    body = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, at, at, at, length, length, align)
        for kind, flags, at, length, align in segments
    )
    body += bytes(24) + struct.pack("<IIII", 1, 1, 0, 0) + strings
    body = body.ljust(dynamic - 64, b"\0")
    return header + body + b"".join(struct.pack("<qQ", tag, value) for tag, value in entries)
