"""Compile the fused SRU with the user's own nvcc, for TensorRT (with NVIDIA's headers) or for PyTorch alone.

One library serves both: it exports the entry points of a TensorRT plugin and the kernels' C interface, and is linked to
neither TensorRT nor the CUDA runtime library (which is inside). NVIDIA's headers are found, never copied.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scconv_deploy.errors import MissingRuntimeError, UsageError
from scconv_deploy.system.atomic import check_output_file, write_file
from scconv_deploy.system.environment import cache_folder, sha256_of
from scconv_deploy.system.gpu import driver_cuda, gpus
from scconv_deploy.system.machine import CUDA_WHEELS, Machine, find_nvcc, find_tensorrt_headers, unused_tensorrt_include
from scconv_deploy.trt_plugins.compilers import run_compilers

SOURCES = Path(__file__).parent / "sru"
LIBRARY = "libscconv_sru.so"
OLDEST_TENSORRT = (10, 3)
KERNEL_SOURCES = ("kernel/sru.cpp", "kernel/sru_float.cu", "kernel/sru_half.cu", "kernel/sru_bfloat16.cu")
PLUGIN_SOURCES = ("plugin/attributes.cpp", "plugin/plugin.cpp", "plugin/creator.cpp")
REGISTER_SOURCE = "register/register.cpp"
COMPILE_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden")
_LIBRARY_FOLDERS = ("kernel", "plugin", "register")
PLUGINS = "plugins"
"""Folder of built libraries in the cache."""
_WHAT = "the fused SRU"


@dataclass(frozen=True)
class BuildRequest:
    """Settings of a build of the fused SRU.

    Attributes:
        architectures: compute capabilities without the dot, for example ``("87", "89")``; empty for the GPUs present.
        tensorrt_include: the folder of NvInfer.h; None to look for it.
        kernels_only: without the TensorRT plugin, for PyTorch alone; needs no header of NVIDIA's.
        register: also the library for hosts that only dlopen, beside the first one.
        sources: the package's own, or those that a bundle carries.
    """

    architectures: tuple[str, ...] = ()
    tensorrt_include: Path | None = None
    kernels_only: bool = False
    register: bool = False
    sources: Path = SOURCES


@dataclass(frozen=True)
class BuildResult:
    """A built library; paths are absolute, ``notes`` tell how it was built."""

    path: Path
    register: Path | None
    architectures: tuple[str, ...]
    cuda: str
    tensorrt: str | None
    cached: bool
    seconds: float
    sha256: str
    notes: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path), "register": self.register and str(self.register)}


@dataclass(frozen=True)
class _Tools:
    nvcc: str
    cuda: str
    include: Path | None
    tensorrt: str | None


def build(
    request: BuildRequest, output: Path | None = None, *, force: bool = False, machine: Machine | None = None
) -> BuildResult:
    """Compile the library to a file or into the cache; a build in the cache is used again.

    Args:
        output: where to; None for the cache (``$XDG_CACHE_HOME/scconv-deploy``), whose key is made of the sources, the
            compiler, the headers' version and the flags.

    Raises:
        MissingRuntimeError: there is no nvcc, no header of TensorRT, or no GPU to build for.
        UsageError: an architecture that nvcc does not know, or an output that exists.
        BuildError: the compiler failed; its lines are in the details.
    """
    machine = machine or Machine()
    if request.register and request.kernels_only:
        raise UsageError(
            "The register library registers the TensorRT plugin.", "Leave --kernels-only or --register out."
        )
    if request.tensorrt_include is not None and request.kernels_only:
        raise UsageError(
            "Without the plugin no header of TensorRT's is used.", "Leave --kernels-only or --tensorrt-include out."
        )
    if output is not None:
        check_output_file(output, force)
        if request.register:
            check_output_file(_register_name(output), force)
    nvcc, cuda = _compiler(machine)
    architectures = _architectures(request, nvcc, cuda, machine)
    tools = _Tools(nvcc, cuda, *((None, None) if request.kernels_only else _headers(request, machine)))
    start = time.monotonic()
    cached = cache_folder(machine.environ) / PLUGINS / _key(request, tools, architectures)
    found = cached / LIBRARY
    complete = found.is_file() and (not request.register or _register_name(found).is_file())
    if output is None:
        if not complete:
            check_output_file(found, force=True)  # before a minute is spent on what cannot be kept
            _compile(request, tools, architectures, found)
        path = found
    else:
        _compile(request, tools, architectures, output)
        path, complete = output, False
    return BuildResult(
        path.absolute(),
        _register_name(path).absolute() if request.register else None,
        architectures,
        tools.cuda,
        tools.tensorrt,
        complete,
        round(time.monotonic() - start, 1),
        sha256_of(path),
        _notes(request, tools, machine),
    )


def built_libraries(machine: Machine | None = None) -> list[Path]:
    """Libraries in the cache that were built from these sources, newest first."""
    folder = cache_folder((machine or Machine()).environ) / PLUGINS
    found = folder.glob(f"{source_digest(SOURCES)[:12]}-*/{LIBRARY}")
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


# --- what is found on the machine ---


def _compiler(machine: Machine) -> tuple[str, str]:
    """nvcc and its version."""
    nvcc = find_nvcc(machine)
    banner = machine.run([nvcc, "--version"]) if nvcc else None
    release = re.search(r"V(\d+\.\d+\.\d+)", banner or "")
    if nvcc is None or release is None:
        raise MissingRuntimeError(
            f"nvcc {'does not run: ' + nvcc if nvcc else 'was not found'} (PATH, CUDA_HOME, /usr/local/cuda, wheels).",
            f"{CUDA_WHEELS}, or install NVIDIA's CUDA toolkit.",
        )
    return nvcc, release[1]


def _headers(request: BuildRequest, machine: Machine) -> tuple[Path, str]:
    """TensorRT's headers and their version."""
    if request.tensorrt_include is not None:
        if not (request.tensorrt_include / "NvInfer.h").is_file():
            raise UsageError(
                f"{request.tensorrt_include} holds no NvInfer.h.", "Name TensorRT's include folder, or leave it out."
            )
        environment = dict(machine.environ) | {"TENSORRT_INCLUDE_DIR": str(request.tensorrt_include.absolute())}
        machine = Machine(run=machine.run, environ=environment, root=machine.root)
    headers = find_tensorrt_headers(machine)
    if headers is None:
        unused = unused_tensorrt_include(machine)
        raise MissingRuntimeError(
            f"TensorRT's headers (NvInfer.h) were not found{f': {unused}' if unused else ''}.",
            "apt install libnvinfer-headers-dev, or give --tensorrt-include with the include folder of NVIDIA/TensorRT "
            "at your version, or --kernels-only for PyTorch.",
        )
    folder, version = headers[0].absolute(), headers[1]
    numbers = [int(part) for part in version.split(".") if part.isdigit()]
    if tuple(numbers[:2]) < OLDEST_TENSORRT:
        raise MissingRuntimeError(
            f"TensorRT's headers in {folder} are of version {version}, expected 10.3 or later.", "Name newer ones."
        )
    return folder, version


def _notes(request: BuildRequest, tools: _Tools, machine: Machine) -> tuple[str, ...]:
    unused = "" if request.tensorrt_include is not None else unused_tensorrt_include(machine)
    return (f"{unused}; taken were those in {tools.include}",) if unused and tools.include is not None else ()


def _architectures(request: BuildRequest, nvcc: str, cuda: str, machine: Machine) -> tuple[str, ...]:
    wanted = request.architectures or _present(cuda, machine)
    known = re.findall(r"compute_(\d+)", machine.run([nvcc, "--list-gpu-arch"]) or "")
    if not known:
        remedy = f"Run {nvcc} --list-gpu-arch to see why; it needs a TMPDIR that can be written."
        raise MissingRuntimeError(f"nvcc {cuda} does not say which architectures it knows.", remedy)
    for architecture in wanted:
        if architecture not in known:
            raise UsageError(f"nvcc {cuda} knows no architecture {architecture!r}.", f"It knows {', '.join(known)}.")
    return tuple(sorted(set(wanted), key=int))


def _present(cuda: str, machine: Machine) -> tuple[str, ...]:
    """Architectures of the GPUs here; refuse an nvcc that is newer than their driver."""
    output = machine.run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]) or ""
    found = [major + minor for major, minor in re.findall(r"^\s*(\d+)\.(\d+)\s*$", output, re.MULTILINE)]
    found = found or [gpu.compute_capability.replace(".", "") for gpu in gpus()]  # no nvidia-smi, or an older one's
    if not found:
        raise MissingRuntimeError("There is no GPU to build for.", "Name its architecture, for example --arch 89.")
    driver = driver_cuda()
    if driver is not None and driver[0] < int(cuda.split(".")[0]):
        raise MissingRuntimeError(
            f"nvcc is of CUDA {cuda}, the driver knows CUDA {driver[0]}.{driver[1]}: what is built would not run here.",
            f"Update the driver, or put an nvcc of CUDA {driver[0]} first on PATH; --arch builds for another machine.",
        )
    return tuple(found)


# --- the cache ---


def source_digest(sources: Path) -> str:
    """SHA-256 of the libraries' sources: of each file's path, a space, its SHA-256 and a line feed, by path.

    CMakeLists.txt makes the same one.
    """
    found = [sources / "sru_math.h", *(p for folder in _LIBRARY_FOLDERS for p in (sources / folder).iterdir())]
    paths = {p.relative_to(sources).as_posix(): p for p in found if p.suffix in (".h", ".cuh", ".cu", ".cpp")}
    lines = [f"{name} {sha256_of(paths[name])}\n" for name in sorted(paths)]
    return sha256_of("".join(lines).encode())


def revision(sources: Path, cuda: str) -> str:
    """Revision of the kernels: a hash of the sources and the compiler's version.

    The plugin has it in its timing cache id, so that a timing cache of other kernels is not used for these.
    """
    return f"r{source_digest(sources)[:12]}_cuda{cuda}"


def _key(request: BuildRequest, tools: _Tools, architectures: Sequence[str]) -> str:
    """Name of a build in the cache; the sources come first, to tell libraries of other sources apart."""
    facts = [tools.cuda, tools.tensorrt, *architectures, *COMPILE_FLAGS, request.kernels_only, os.uname().machine]
    return f"{source_digest(request.sources)[:12]}-{sha256_of(json.dumps(facts).encode())[:12]}"


# --- the compiler ---


def compile_command(
    nvcc: str,
    architectures: Sequence[str],
    include: Path | None,
    soname: str,
    output: Path,
    *extra: str,
    folder: Path = SOURCES,
) -> list[str]:
    """The compiler's command line: machine code for each architecture, and PTX of the oldest and of the newest.

    The driver compiles the newest PTX that is not newer than the GPU. That of the oldest architecture serves every GPU
    from it on, that of the newest brings those to come what the older one lacks (clusters, from 9.0 on).

    Args:
        architectures: oldest first.
    """
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    ends = dict.fromkeys((architectures[0], architectures[-1]))
    targets += [f"-gencode=arch=compute_{a},code=compute_{a}" for a in ends]
    sources = KERNEL_SOURCES + (PLUGIN_SOURCES if include is not None else ())
    return [
        nvcc,
        *COMPILE_FLAGS,
        *targets,
        "--threads=0",
        "-shared",
        *library_folders(nvcc),
        *(() if include is None else ("-isystem", str(include))),
        *extra,
        *(str(folder / source) for source in sources),
        f"-Xlinker=-soname={soname}",
        "-o",
        str(output),
    ]


def library_folders(nvcc: str) -> tuple[str, ...]:
    """Options for the folder lib of PyPI's wheels: libcudart_static.a is there, and nvcc looks in lib64 alone."""
    folder = Path(nvcc).parent.parent / "lib"
    return (f"-L{folder}",) if (folder / "libcudart_static.a").is_file() else ()


def _compile(request: BuildRequest, tools: _Tools, architectures: Sequence[str], output: Path) -> None:
    """Compile into a temporary folder, and move the result to its place in one step."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        library = Path(folder) / output.name
        define = f"-DSCCONV_SRU_REVISION={revision(request.sources, tools.cuda)}"
        command = compile_command(
            tools.nvcc, architectures, tools.include, output.name, library, define, folder=request.sources
        )
        run_compilers([command], folder, _WHAT)
        products = {output: library}
        if request.register:
            products[_register_name(output)] = _compile_register(tools, library, request.sources)
        for path, product in products.items():
            write_file(path, product.read_bytes())


def _compile_register(tools: _Tools, library: Path, sources: Path = SOURCES) -> Path:
    """The register library, linked to the plugin beside it and to libnvinfer of the headers' major version.

    libnvinfer need not be here: a stub of its soname stands for it in the linker, as CUDA's own stubs do.
    """
    folder = library.parent
    soname = f"libnvinfer.so.{(tools.tensorrt or '').split('.')[0]}"
    stub = folder / "stub.cpp"
    stub.write_text('extern "C" void* getPluginRegistry() noexcept { return nullptr; }\n', encoding="utf-8")
    compiler = [tools.nvcc, "-std=c++17", "-O2", "-shared", "-cudart=none", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    run_compilers([[*compiler, str(stub), f"-Xlinker=-soname={soname}", "-o", str(folder / soname),
                    "-Xcompiler", "-fvisibility=default"]], str(folder), _WHAT)  # fmt: skip
    product = _register_name(library)
    run_compilers([[
        *compiler, *library_folders(tools.nvcc), "-isystem", str(tools.include), str(sources / REGISTER_SOURCE),
        "-Xlinker=--no-as-needed", str(library), f"-Xlinker={folder / soname}", "-Xlinker=-rpath=$ORIGIN",
        f"-Xlinker=-soname={product.name}", "-o", str(product),
    ]], str(folder), _WHAT)  # fmt: skip
    return product


def _register_name(path: Path) -> Path:
    return path.with_name(f"{path.stem}_register{path.suffix}")
