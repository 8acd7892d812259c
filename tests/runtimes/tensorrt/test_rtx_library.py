"""The name under which TensorRT-RTX's parser looks for plugins, made to resolve in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from scconv_deploy.runtimes.tensorrt import rtx_library
from scconv_deploy.runtimes.tensorrt.rtx_library import NAME, empty_library

linux = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine not in ("x86_64", "aarch64"), reason="the library is made for Linux"
)
_LOADS = f"""
import ctypes
def loads():
    try:
        return ctypes.CDLL({NAME!r})
    except OSError:
        return None
"""


def child(code):
    done = subprocess.run([sys.executable, "-c", _LOADS + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@linux
def test_a_library_is_found_under_the_empty_ones_name():
    """The maths library stands for TensorRT-RTX's: what it exports is found through the name."""
    found = child(
        "import os\n"
        f"from {rtx_library.__name__} import empty_library\n"
        "file = os.memfd_create('m')\n"
        f"os.write(file, empty_library({NAME!r}, 'libm.so.6', os.uname().machine))\n"
        "before = loads()\n"
        "kept = ctypes.CDLL(f'/proc/self/fd/{file}')\n"
        "cos = loads().cos\n"
        "cos.argtypes, cos.restype = [ctypes.c_double], ctypes.c_double\n"
        "print(before, cos(0.0))"
    )
    assert found == ["None", "1.0"]


@pytest.mark.tensorrt
@linux
def test_the_name_resolves_once_the_library_is_loaded_and_not_before():
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    found = child(
        f"from {rtx_library.__name__} import resolve\n"
        "reason = resolve()\n"
        "resolve.cache_clear()\n"
        "import tensorrt_rtx\n"
        "before = loads()\n"
        "print(reason.replace(' ', '_'), before, repr(resolve()))\n"
        "version = tensorrt_rtx.__version__.split('.')\n"
        "print(loads().getInferLibVersion(), int(version[0]) * 10000 + int(version[1]) * 100 + int(version[2]))"
    )
    reason, before, resolved, through_the_name, own = found
    assert (reason, resolved) == ("TensorRT-RTX's_library_is_not_loaded", "''")
    assert through_the_name == own
    assert before == "None" or before.startswith("<CDLL")  # an installation may have the name


def test_another_system_is_a_reason(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    rtx_library.resolve.cache_clear()
    try:
        assert rtx_library.resolve() == "libtensorrt_rtx.so is a name of Linux on x86-64 and aarch64"
    finally:
        rtx_library.resolve.cache_clear()


@pytest.mark.parametrize(("machine", "number"), [("x86_64", 62), ("aarch64", 183)])
def test_the_file_is_an_elf_library_without_code_and_without_an_executable_stack(machine, number):
    data = empty_library("libshort.so", "liblong.so.1", machine)
    assert data[:6] == b"\x7fELF\x02\x01"
    assert int.from_bytes(data[16:18], "little") == 3
    assert int.from_bytes(data[18:20], "little") == number
    segments = [data[64 + 56 * i : 64 + 56 * (i + 1)] for i in range(3)]
    kinds = [int.from_bytes(segment[:4], "little") for segment in segments]
    assert kinds == [1, 2, 0x6474E551]
    assert all(int.from_bytes(segment[4:8], "little") & 1 == 0 for segment in segments)  # nothing may be executed
    assert b"\0libshort.so\0liblong.so.1\0" in data
