"""The compilers' products, made once a session; each skips with its reason where it cannot be made."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from scconv_deploy.system.machine import Machine, find_nvcc, find_tensorrt_headers
from scconv_deploy.trt_plugins import library
from scconv_deploy.trt_plugins.build import (
    PLUGIN_SOURCES,
    SOURCES,
    BuildRequest,
    build,
    library_folders,
    revision,
)
from scconv_deploy.trt_plugins.library import SruLibrary, load
from tests.made_once import once
from tests.trt_plugins.emulated import HERE as EMULATION
from tests.trt_plugins.emulated import LIGHTLY, RACES, SANITIZE, EmulatedLibrary, compile_kernels
from tests.trt_plugins.reference import Reference


@pytest.fixture(autouse=True)
def no_cached_cpu_library(monkeypatch):
    """The operator on the CPU in plain PyTorch, whatever the user's cache holds."""
    monkeypatch.setattr(library, "cached_library", lambda: None)


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    """The kernels' arithmetic on the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return Reference(tmp_path_factory.mktemp("reference"))


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory) -> EmulatedLibrary:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    return EmulatedLibrary(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def emulated(emulated_library) -> EmulatedLibrary:
    """The kernels themselves on the CPU, on an H200's limits."""
    emulated_library.device()
    return emulated_library


@dataclass(frozen=True)
class RaceRunner:
    """Runs programs that were compiled with ThreadSanitizer, where the addresses that the system gives out allow it."""

    prefix: tuple[str, ...]

    def run(self, program: Path, *arguments: object, names: bool = True) -> subprocess.CompletedProcess[str]:
        """names: of the functions that race, which take half of a small program's time."""
        command = [*self.prefix, str(program), *map(str, arguments)]
        environment = dict(os.environ) | {"TSAN_OPTIONS": f"exitcode=66 halt_on_error=1 symbolize={int(names)}"}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture(scope="session")
def races(tmp_path_factory) -> RaceRunner:
    program = tmp_path_factory.mktemp("races") / "program"
    compile_empty(program, *RACES)
    for prefix in (("setarch", "-R"), ()):  # unpredictable addresses are none that this sanitizer expects
        if (not prefix or shutil.which(prefix[0])) and not RaceRunner(prefix).run(program).returncode:
            return RaceRunner(prefix)
    pytest.skip("ThreadSanitizer does not run here")


@pytest.fixture(scope="session")
def memory_sanitizers(tmp_path_factory) -> tuple[str, ...]:
    """Flags of the address and the undefined-behaviour sanitizer."""
    compile_empty(tmp_path_factory.mktemp("memory") / "program", *SANITIZE)
    return SANITIZE


def compile_empty(program: Path, *flags: str) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    command = ["g++", *flags, "-x", "c++", "-", "-o", str(program)]
    if subprocess.run(command, input="int main() {}", text=True, capture_output=True, check=False).returncode:
        pytest.skip(f"g++ has no {' '.join(flags)} here")


@pytest.fixture(scope="session")
def nvcc() -> str:
    found = find_nvcc(Machine())
    if found is None:
        pytest.skip("nvcc was not found")
    return found


@pytest.fixture(scope="session")
def gpu_library(request) -> SruLibrary:
    """The kernels for the GPU: those that SCCONV_SRU_LIBRARY names, or built here with nvcc."""
    given = os.environ.get("SCCONV_SRU_LIBRARY")
    if given:
        return load(Path(given))
    request.getfixturevalue("nvcc")
    return load(build(BuildRequest(kernels_only=True)).path)


@dataclass(frozen=True)
class Harness:
    """A host without TensorRT, a plugin, and the stand-in of libnvinfer, compiled with one version's headers."""

    folder: Path
    version: str
    include: Path
    program: str = "sru_harness"

    @property
    def plugin(self) -> Path:
        return self.folder / "libscconv_sru.so"

    def run(self, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.folder / self.program), *map(str, arguments)]
        environment = dict(os.environ) | {"LD_LIBRARY_PATH": str(self.folder / "stand_in")} | environ
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


HIDDEN = ("-Xcompiler", "-fvisibility=hidden", "-shared")
HARNESS_REVISION = revision(SOURCES, "13.0.88")
HARNESS_SOURCES = [SOURCES / "harness" / f"{name}.cpp" for name in ("main", "host", "check", "run")]


@pytest.fixture(scope="session")
def tensorrt_headers() -> tuple[Path, str]:
    found = find_tensorrt_headers(Machine())
    if found is None:
        pytest.skip("TensorRT's headers were not found; set TENSORRT_INCLUDE_DIR")
    return found


@pytest.fixture(scope="session")
def harness(nvcc, tensorrt_headers, tmp_path_factory) -> Harness:
    """The plugin without kernels (no_device.cpp), so that it compiles in seconds; everything else is the real thing.

    Compiled once for all workers of a run, and for the modules elsewhere that import the fixture.
    """
    include, version = tensorrt_headers
    folder = tmp_path_factory.mktemp("harness")
    (folder / "stand_in").mkdir()
    for name, content in once(f"harness-{version}", lambda: compile_harness(nvcc, include, version, folder)).items():
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o755)
    return Harness(folder, version, include)


def compile_harness(nvcc: str, include: Path, version: str, folder: Path) -> dict[str, bytes]:
    """Plugin, program and stand-in of libnvinfer by their paths in the folder."""
    flags = compiler(nvcc, include)
    stand_in = f"libnvinfer.so.{version.split('.')[0]}"
    compile_all(
        [*flags, *HIDDEN, "-arch=sm_89", f"-DSCCONV_SRU_REVISION={HARNESS_REVISION}",
         *(str(SOURCES / source) for source in (*PLUGIN_SOURCES, "kernel/sru.cpp")),
         str(Path(__file__).parent / "no_device.cpp"), "-Xlinker=-soname=libscconv_sru.so",
         "-o", str(folder / "libscconv_sru.so")],
        [*flags, *map(str, HARNESS_SOURCES), "-ldl", "-o", str(folder / "sru_harness")],
        [*flags, *HIDDEN, "-Xcompiler", "-Wno-overloaded-virtual,-Wno-deprecated-declarations",
         str(SOURCES / "harness" / "registry.cpp"), f"-Xlinker=-soname={stand_in}",
         "-o", str(folder / "stand_in" / stand_in)],
    )  # fmt: skip
    return {name: (folder / name).read_bytes() for name in ("libscconv_sru.so", "sru_harness", f"stand_in/{stand_in}")}


@pytest.fixture(scope="session")
def plugin_on_a_gpu(nvcc, tensorrt_headers, tmp_path_factory) -> Path:
    """The plugin without kernels on an H200 that answers until something is launched (one_device.cpp).

    What CUDA says of the kernels is SCCONV_TEST_STATUS.
    """
    product = tmp_path_factory.mktemp("on_a_gpu") / "libscconv_sru.so"
    sources = [SOURCES / source for source in (*PLUGIN_SOURCES, "kernel/sru.cpp")]
    sources += [Path(__file__).parent / name for name in ("no_device.cpp", "one_device.cpp")]
    flags = [*compiler(nvcc, tensorrt_headers[0]), *HIDDEN, "-cudart=none"]
    compile_all([*flags, f"-DSCCONV_SRU_REVISION={HARNESS_REVISION}", *map(str, sources), "-o", str(product)])
    return product


@pytest.fixture(scope="session")
def rtx_harness(harness) -> Harness:
    """The same host by the name by which the plugin knows TensorRT-RTX."""
    program = "libtensorrt_rtx.so.1"
    shutil.copy(harness.folder / harness.program, harness.folder / program)
    return replace(harness, program=program)


@pytest.fixture(scope="session")
def emulated_harness(nvcc, tensorrt_headers, tmp_path_factory) -> Harness:
    """The same host and plugin on the CPU through enqueue: the kernels and CUDA's runtime are emulated."""
    include, version = tensorrt_headers
    folder = tmp_path_factory.mktemp("emulated_harness")
    objects, runtime = compile_kernels(folder / "objects", *LIGHTLY), str(EMULATION / "runtime.cpp")
    flags = [*compiler(nvcc, include), "-cudart=none"]
    compile_all(
        [*flags, *HIDDEN, *(str(SOURCES / source) for source in PLUGIN_SOURCES), runtime, *objects,
         "-o", str(folder / "libscconv_sru.so")],
        [*flags, *map(str, HARNESS_SOURCES), runtime, "-ldl", "-o", str(folder / "sru_harness")],
    )  # fmt: skip
    return Harness(folder, version, include)


def compiler(nvcc: str, include: Path) -> list[str]:
    return [nvcc, "-std=c++17", "-O1", "-isystem", str(include), "-Xcompiler", "-fPIC,-Wall,-Wextra,-Werror",
            *library_folders(nvcc)]  # fmt: skip


def unoptimised(flags: tuple[str, ...]) -> tuple[str, ...]:
    """The flags without optimisation, which is most of nvcc's time."""
    plain = ("-O0", "-Xcicc", "-O0", "-Xptxas", "-O0")
    return tuple(part for flag in flags for part in (plain if flag == "-O3" else (flag,)))


def compile_all(*commands: list[str]) -> None:
    """Side by side."""
    running = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for c in commands]
    outputs = [process.communicate()[0] for process in running]
    assert not any(process.returncode for process in running), "\n".join(outputs)
