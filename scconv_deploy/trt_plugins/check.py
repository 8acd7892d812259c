"""Checks of a built plugin: exports, dependencies, GPU code, and whether a runtime registers it."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.graph.contract import OPERATORS, PLUGIN_NAMESPACE, PLUGIN_VERSION
from scconv_deploy.system.backends import BACKENDS
from scconv_deploy.system.machine import Machine
from scconv_deploy.trt_plugins.elf import SharedLibrary, read_library

ENTRY_POINTS = ("getCreators", "setLoggerFinder")
C_INTERFACE = (
    "scconv_sru_abi_version",
    "scconv_sru_choose",
    "scconv_sru_enqueue",
    "scconv_sru_refusal",
    "scconv_sru_workspace_bytes",
)

# Symbols of NVIDIA's that a host would have to offer: their versions would tie the plugin to one TensorRT.
_FOREIGN_PREFIXES = ("nvinfer", "_ZN8nvinfer1", "getPluginRegistry", "getLogger", "getInferLib", "createInfer")
_FOREIGN_LIBRARIES = ("libnvinfer", "libnvonnxparser", "libcudart", "libtensorrt")
_CHILD_TIMEOUT_S = 120
_LOAD = """
import json, sys
import {module} as trt
registry = trt.get_plugin_registry()
{load}
found = [[c.name, c.plugin_version, c.plugin_namespace] for c in registry.all_creators]
print(json.dumps({{"version": trt.__version__, "loaded": loaded, "creators": found}}))
"""
_BY_REGISTRY = "loaded = registry.load_library(sys.argv[1]) is not None"
_BY_DLOPEN = """
import ctypes
try:
    loaded = ctypes.CDLL(sys.argv[1]) is not None
except OSError as error:
    sys.exit(f"it does not load: {error}")
"""
CREATORS = "scconv_sru_creators"
"""Symbol that the plugin exports for the register library alone."""


@dataclass(frozen=True)
class CheckRow:
    """One check of a library and its result."""

    name: str
    verdict: Literal["passed", "failed", "not run"]
    found: str


@dataclass(frozen=True)
class PluginReport:
    """Result of all checks of a library; falsy when one failed."""

    path: Path
    rows: tuple[CheckRow, ...]
    architectures: tuple[str, ...]
    ptx: tuple[str, ...]
    needed: tuple[str, ...]
    versions: dict[str, str]

    def __bool__(self) -> bool:
        return not self.failures

    @property
    def failures(self) -> tuple[CheckRow, ...]:
        return tuple(row for row in self.rows if row.verdict == "failed")

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"path": str(self.path), "verdict": "passed" if self else "failed"}


def check_plugin(path: Path, machine: Machine | None = None) -> PluginReport:
    """Check a plugin or its register library; loaded only when its symbols are right, and only in a child process.

    Raises:
        UsageError: there is no such file.
        IntegrityError: it is no shared library.
    """
    machine = machine or Machine()
    if not path.is_file():
        wrong = "is no regular file" if path.exists() else "does not exist"
        raise UsageError(f"{path} {wrong}.", "Build it: scconv-deploy plugin build -o FILE")
    library = read_library(path)
    registers = CREATORS in library.undefined
    rows = _register_rows(path, library) if registers else _static_rows(library)
    runtimes = ["tensorrt"] if registers else list(BACKENDS)
    here = platform.machine().replace("_", "-")
    why = ""
    if not all(row.verdict == "passed" for row in rows):
        why = "its symbols are wrong" if not registers else "what it needs is not there"
    elif library.machine != here:
        why = f"it is for {library.machine}, this machine is {here}"
    if why:
        rows += [CheckRow(f"loads in {package}", "not run", why) for package in runtimes]
    elif registers:
        rows.append(_register_load_row(path, library, machine))
    else:
        rows += [_load_row(path, package, machine, _BY_REGISTRY) for package in runtimes]
    return PluginReport(path, tuple(rows), library.cubins, library.ptx, library.needed, library.versions)


def _static_rows(library: SharedLibrary) -> list[CheckRow]:
    missing = [name for name in (*ENTRY_POINTS, *C_INTERFACE) if name not in library.exported]
    foreign = sorted(name for name in library.undefined if name.startswith(_FOREIGN_PREFIXES))
    linked = sorted(name for name in library.needed if name.startswith(_FOREIGN_LIBRARIES))
    extra = sorted(library.exported - {*ENTRY_POINTS, *C_INTERFACE, CREATORS} - set(runtime_symbols(library)))
    code = library.cubins or library.ptx
    return [
        _row("entry points and C interface", not missing, "all exported", _missing(missing)),
        _row("nothing else exported", not extra, "no other symbol", f"also exported: {', '.join(extra[:5])}"),
        _row("no symbol of libnvinfer needed", not foreign, "none", ", ".join(foreign[:5])),
        _row("not linked to TensorRT or the CUDA runtime", not linked, ", ".join(library.needed), ", ".join(linked)),
        _row("GPU code", bool(code), library.code, "there is none"),
        _runs_on(library),
    ]


def _runs_on(library: SharedLibrary) -> CheckRow:
    newest = ", ".join(f"{family} {version}" for family, version in sorted(library.versions.items()))
    return CheckRow("runs on", "passed", f"{library.machine}, needs {newest or 'no versioned symbol'}")


def _register_rows(path: Path, library: SharedLibrary) -> list[CheckRow]:
    """Checks of the library of ``plugin build --register``, for hosts that only dlopen."""
    plugin = next((name for name in library.needed if _is_plugin(path.parent / name)), "")
    majors = [name for name in library.needed if re.fullmatch(r"libnvinfer\.so\.\d+", name)]
    extra = sorted(library.exported - set(runtime_symbols(library)))
    absent = f"none of {', '.join(library.needed) or 'nothing'} lies beside it and exports {CREATORS}"
    beside = "$ORIGIN" in library.run_path
    return [
        CheckRow("what it is", "passed", "the register library: it registers the plugin where it is loaded"),
        _row("the plugin beside it", bool(plugin), f"{plugin}: check it too", absent),
        _row("finds it there", beside, "run path $ORIGIN", f"run path {':'.join(library.run_path) or 'none'}"),
        _row("linked to one TensorRT", len(majors) == 1, ", ".join(majors), ", ".join(majors) or "no libnvinfer.so.N"),
        _row("nothing exported", not extra, "no symbol", f"exported: {', '.join(extra[:5])}"),
        _runs_on(library),
    ]


def _is_plugin(path: Path) -> bool:
    try:
        return path.is_file() and CREATORS in read_library(path).exported
    except IntegrityError:
        return False


def _register_load_row(path: Path, library: SharedLibrary, machine: Machine) -> CheckRow:
    """Load check of the register library, which only TensorRT of the linked major version can load."""
    (major,) = (name.rpartition(".")[2] for name in library.needed if name.startswith("libnvinfer.so."))
    installed = machine.installed("tensorrt")
    if installed is not None and installed.split(".")[0] != major:
        return CheckRow("loads in tensorrt", "not run", f"it is for TensorRT {major}, {installed} is installed")
    return _load_row(path, "tensorrt", machine, _BY_DLOPEN)


def _missing(names: list[str]) -> str:
    kernels = "; it was built with --kernels-only, for PyTorch alone" if names == [*ENTRY_POINTS] else ""
    return f"not exported: {', '.join(names)}{kernels}"


def runtime_symbols(library: SharedLibrary) -> list[str]:
    """Weak template instances of the C++ library and the linker's marks, which every compiler exports."""
    return [name for name in library.exported if name.startswith(("_ZNSt", "_ZSt", "_ZNKSt", "_ZTI", "_ZTS", "_ZTV"))]


def _row(name: str, passed: bool, found: str, otherwise: str) -> CheckRow:
    return CheckRow(name, "passed" if passed else "failed", found if passed else otherwise)


def answer_of(command: Sequence[str]) -> dict[str, Any] | str:
    """JSON that a child process prints last; where it gives none, why: its last error, its exit status, or the time."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer in {_CHILD_TIMEOUT_S} s"
    try:
        answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return answer
    except (IndexError, json.JSONDecodeError):
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _load_row(path: Path, package: str, machine: Machine, how: str) -> CheckRow:
    """Load check in a child process: a plugin that crashes fails the check."""
    name = f"loads in {package}"
    if machine.installed(package) is None:
        return CheckRow(name, "not run", f"{package} is not installed")
    command = [sys.executable, "-c", _LOAD.format(module=BACKENDS[package].module, load=how), str(path.absolute())]
    answer = answer_of(command)
    if isinstance(answer, str):
        if "ImportError" in answer or "ModuleNotFoundError" in answer or "OSError" in answer:
            return CheckRow(name, "not run", f"{package} is installed, but does not import: {answer}")
        return CheckRow(name, "failed", answer)
    expected = {(operator, PLUGIN_VERSION, PLUGIN_NAMESPACE) for operator in OPERATORS}
    found = {tuple(creator) for creator in answer["creators"] if creator[2] == PLUGIN_NAMESPACE}
    registered = ", ".join(f"{space}::{operator} {version}" for operator, version, space in sorted(found)) or "nothing"
    passed = answer["loaded"] and expected <= found
    return CheckRow(name, "passed" if passed else "failed", f"{package} {answer['version']} registers {registered}")
