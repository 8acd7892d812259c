"""Programs and headers of this machine. Standard library only: it also runs on the device."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from scconv_deploy.system.environment import installed_version

PACKAGE = "scconv-deploy"
CUDA_WHEELS = "pip install 'scconv-deploy[cuda]'"
"""Remedy where no CUDA toolkit is installed."""

_CHILD_TIMEOUT_S = 120
_TENSORRT_INCLUDES = (
    "/usr/include/x86_64-linux-gnu",
    "/usr/include/aarch64-linux-gnu",
    "/usr/include",
    "/usr/local/tensorrt/include",
    "/opt/tensorrt/include",
)


def _run(command: Sequence[str]) -> str | None:
    """Output of a program, or None where it cannot be run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _requirements() -> list[str]:
    return metadata.requires(PACKAGE) or []


@dataclass(frozen=True)
class Machine:
    """Access to programs, files and variables of the machine; tests put their own in its place."""

    run: Callable[[Sequence[str]], str | None] = _run
    which: Callable[[str], str | None] = shutil.which
    installed: Callable[[str], str | None] = installed_version
    requirements: Callable[[], list[str]] = _requirements
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    root: Path = Path("/")
    site_packages: tuple[Path, ...] = field(default_factory=lambda: tuple(Path(p) for p in sys.path if p))

    def asked_child(self, code: str) -> dict[str, Any] | None:
        """JSON that a Python child process prints last; None where it fails."""
        output = self.run([sys.executable, "-c", code])
        try:
            return json.loads(output.strip().splitlines()[-1]) if output else None
        except (json.JSONDecodeError, IndexError):
            return None


def find_nvcc(machine: Machine) -> str | None:
    """nvcc on PATH, in CUDA_HOME, in /usr/local/cuda, or of a PyPI wheel."""
    return find_cuda_tool("nvcc", machine)


def find_cuda_tool(name: str, machine: Machine) -> str | None:
    """A program of CUDA's toolkit, looked for like nvcc."""
    places = [Path(machine.environ[key]) for key in ("CUDA_HOME", "CUDA_PATH") if machine.environ.get(key)]
    places.append(machine.root / "usr" / "local" / "cuda")
    for site in machine.site_packages:
        places += [site / "nvidia" / folder for folder in ("cu13", "cuda_nvcc", "cuda_sanitizer_api")]
    return machine.which(name) or next((str(p / "bin" / name) for p in places if (p / "bin" / name).is_file()), None)


def find_cxx(machine: Machine) -> str | None:
    """The C++ compiler of ``CXX``, else g++, clang++ or c++ on PATH."""
    return next(filter(None, map(machine.which, [machine.environ.get("CXX", ""), "g++", "clang++", "c++"])), None)


def find_tensorrt_headers(machine: Machine) -> tuple[Path, str] | None:
    """The folder of NvInfer.h and its version."""
    given = machine.environ.get("TENSORRT_INCLUDE_DIR")
    folders = [Path(given)] if given else []
    folders += [machine.root / place.lstrip("/") for place in _TENSORRT_INCLUDES]
    for folder in folders:
        version = folder / "NvInferVersion.h"
        if (folder / "NvInfer.h").is_file() and version.is_file():
            text = version.read_text(encoding="utf-8", errors="replace")
            defines = dict(re.findall(r"#define\s+(\w+)\s+(\w+)", text))
            parts = [_resolved(defines, f"NV_TENSORRT_{part}") for part in ("MAJOR", "MINOR", "PATCH")]
            return folder, ".".join(parts)
    return None


def unused_tensorrt_include(machine: Machine) -> str:
    """A note that TENSORRT_INCLUDE_DIR is set but holds no headers; "" where it holds some."""
    given = machine.environ.get("TENSORRT_INCLUDE_DIR", "")
    if not given or all((Path(given) / name).is_file() for name in ("NvInfer.h", "NvInferVersion.h")):
        return ""
    return f"TENSORRT_INCLUDE_DIR={given} holds no NvInfer.h"


def _resolved(defines: Mapping[str, str], name: str) -> str:
    """The number behind a macro; TensorRT 10.13 and later define one macro by another."""
    value = defines.get(name, "?")
    return _resolved({k: v for k, v in defines.items() if k != name}, value) if value in defines else value


def jetson_linux(machine: Machine) -> str | None:
    """The release of Jetson Linux that runs here, ``36.4`` for example; None where it is another system."""
    place = machine.root / "etc" / "nv_tegra_release"
    if not place.is_file():
        return None
    text = place.read_text(encoding="utf-8", errors="replace")
    found = re.search(r"R(\d+)(?: \(release\))?(?:, REVISION: (\d+))?", text)
    return "?" if found is None else ".".join(filter(None, found.groups()))
