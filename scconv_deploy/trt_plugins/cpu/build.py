"""Compile the fused SRU for CPUs with the host's own compiler, g++ or clang.

One library serves ONNX Runtime (as a library of custom operators) and PyTorch (through its C interface). It is linked
to neither, and its sources need no header of theirs. It holds code for several vector widths, and takes the widest that
the processor has: what is built on one machine runs on every other of the same architecture.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.system.atomic import check_output_file, write_file
from scconv_deploy.system.environment import cache_folder, sha256_of
from scconv_deploy.system.machine import Machine, find_cxx
from scconv_deploy.trt_plugins.build import PLUGINS, SOURCES
from scconv_deploy.trt_plugins.compilers import run_compilers

CPU_SOURCES = SOURCES / "cpu"
CPU_LIBRARY = "libscconv_sru_cpu.so"
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden")
"""Without contraction every vector width computes the same bytes: the narrowest has no fused multiply-add, and the
others use it where a product is exact."""
WIDTHS = {
    "width4.cpp": (),
    "width8.cpp": ("-mavx2", "-mfma", "-mf16c"),
    "width16.cpp": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
}
"""Sources of the vector widths with the flags of their instructions; the first is for every processor."""
_ALWAYS = ("sru.cpp", "ort_operators.cpp")
_X86 = ("x86_64", "AMD64")


@dataclass(frozen=True)
class CpuBuild:
    """A built library; ``path`` is absolute, ``compiler`` the first line of its version."""

    path: Path
    compiler: str
    cached: bool
    seconds: float
    sha256: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path)}


def build_cpu(output: Path | None = None, *, force: bool = False, machine: Machine | None = None) -> CpuBuild:
    """Compile the library to a file or into the cache; a build in the cache is used again.

    Args:
        output: where to; None for the cache, whose key is made of the sources, the compiler and the flags.

    Raises:
        MissingRuntimeError: there is no C++ compiler.
        UsageError: an output that exists.
        BuildError: the compiler failed; its lines are in the details.
    """
    machine = machine or Machine()
    if output is not None:
        check_output_file(output, force)
    compiler, banner = _compiler(machine)
    start = time.monotonic()
    key = json.dumps([banner, FLAGS, WIDTHS, os.uname().machine])
    folder = f"{source_digest()[:12]}-{sha256_of(key.encode())[:12]}"
    path = output or cache_folder(machine.environ) / PLUGINS / folder / CPU_LIBRARY
    cached = output is None and path.is_file()
    if not cached:
        check_output_file(path, force=True)  # before seconds are spent on what cannot be kept
        _compile(compiler, path)
    return CpuBuild(path.absolute(), banner, cached, round(time.monotonic() - start, 1), sha256_of(path))


def built_cpu_library(machine: Machine | None = None) -> Path | None:
    """The newest library in the cache that was built from these sources, or None."""
    folder = cache_folder((machine or Machine()).environ) / PLUGINS
    found = folder.glob(f"{source_digest()[:12]}-*/{CPU_LIBRARY}")
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def source_digest() -> str:
    """SHA-256 of the sources: of each file's name, a space, its SHA-256 and a line feed, by name."""
    return sha256_of("".join(f"{p.name} {sha256_of(p)}\n" for p in sorted(CPU_SOURCES.iterdir())).encode())


def compile_commands(compiler: str, folder: Path, *extra: str) -> list[list[str]]:
    """One command line a source, for objects in a folder; those of other architectures' widths are left out."""
    flags = {source: WIDTHS.get(source, ()) for source in (*_ALWAYS, *widths())}
    return [
        [compiler, *FLAGS, *extra, *given, "-c", str(CPU_SOURCES / source), "-o", str(folder / f"{source}.o")]
        for source, given in flags.items()
    ]


def widths() -> tuple[str, ...]:
    """Sources of the vector widths that this architecture has."""
    return tuple(WIDTHS) if os.uname().machine in _X86 else tuple(WIDTHS)[:1]


def _compiler(machine: Machine) -> tuple[str, str]:
    """The compiler and the first line of its version."""
    compiler = find_cxx(machine)
    banner = (machine.run([compiler, "--version"]) or "").splitlines()[:1] if compiler else []
    if compiler is None or not banner:
        what = f"{compiler} does not run" if compiler else "No C++ compiler was found (CXX, g++, clang++)"
        raise MissingRuntimeError(f"{what}.", "apt install g++, or name one in CXX.")
    return compiler, banner[0]


def _compile(compiler: str, output: Path) -> None:
    """Compile into a temporary folder, and move the result to its place in one step."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder, what = Path(name), "the fused SRU for CPUs"
        run_compilers(compile_commands(compiler, folder), name, what)
        library = folder / CPU_LIBRARY
        objects = [str(path) for path in sorted(folder.glob("*.o"))]
        link = [compiler, "-shared", "-pthread", "-Wl,--no-undefined", f"-Wl,-soname={output.name}", *objects]
        run_compilers([[*link, "-o", str(library)]], name, what)
        write_file(output, library.read_bytes())
