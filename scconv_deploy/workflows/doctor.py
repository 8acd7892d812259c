"""Diagnosis of this machine: runtimes, GPUs, compilers, headers, and versions that do not fit together.

torch, ONNX Runtime and TensorRT are imported in child processes: one that crashes on import is a finding, not a crash.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from scconv_deploy.exporters.tensorrt.targets import jetpack_of
from scconv_deploy.system.backends import BACKENDS
from scconv_deploy.system.cpu import int8_instructions
from scconv_deploy.system.environment import platform_facts
from scconv_deploy.system.machine import (
    CUDA_WHEELS,
    PACKAGE,
    Machine,
    find_nvcc,
    find_tensorrt_headers,
    jetson_linux,
    unused_tensorrt_include,
)
from scconv_deploy.version import __version__

Status = Literal["ok", "missing", "warning"]
RTX_COMPUTE_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities of TensorRT-RTX (its support matrix; names in ``tensorrt_rtx.ComputeCapability``)."""

_OPTIONAL = {
    "scikit-learn": ("--data photos", "pip install 'scconv-deploy[data]'"),
    "pillow": ("--data with images", "pip install 'scconv-deploy[data]'"),
    **{name: (facts.purpose, facts.install) for name, facts in BACKENDS.items()},
}


@dataclass(frozen=True)
class Finding:
    """Result of one look-up.

    Attributes:
        name: package, tool or device.
        found: version and place, or what is wrong.
        needed_for: use that is impossible without it.
        remedy: command that installs or repairs it; "" if nothing is to do.
    """

    group: Literal["python", "runtime", "cpu", "gpu", "compiler", "versions"]
    name: str
    status: Status
    found: str
    needed_for: str = ""
    remedy: str = ""
    required: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """All findings; falsy if something required is missing."""

    findings: tuple[Finding, ...]

    def __bool__(self) -> bool:
        return not self.lacking(())

    def lacking(self, required: Sequence[str]) -> list[Finding]:
        """Missing findings among the package's own requirements and these names; an unknown name counts as missing."""
        names = {f.name for f in self.findings if f.status != "missing"}
        found = [f for f in self.findings if f.status == "missing" and (f.required or f.name in required)]
        known = names | {f.name for f in found}
        unknown = [Finding("python", name, "missing", "not known to doctor") for name in required if name not in known]
        return found + unknown

    def as_json(self) -> dict[str, Any]:
        return {"findings": [asdict(finding) for finding in self.findings], "complete": bool(self)}


def diagnose(machine: Machine | None = None) -> Diagnosis:
    """Look up everything; takes a few seconds, because torch and each runtime are imported."""
    machine = machine or Machine()
    findings = [*_python(machine), *_runtimes(machine), *_cpu(machine), *_gpus(machine), *_compilers(machine)]
    return Diagnosis((*findings, *_contradictions(machine, findings)))


# --- what is there -----------------------------------------------------------------------------------------------


def _python(machine: Machine) -> Iterator[Finding]:
    yield Finding("python", "python", "ok", "{python} on {machine}".format(**platform_facts()))
    yield Finding("python", PACKAGE, "ok", __version__)
    for text in machine.requirements():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version, wanted = machine.installed(requirement.name), f"{requirement.name}{requirement.specifier}"
        if version is None:
            remedy = f"pip install '{wanted}'"
            yield Finding("python", requirement.name, "missing", "not installed", "everything", remedy, required=True)
        elif not requirement.specifier.contains(version, prereleases=True):
            found = f"{version}, expected {requirement.specifier}"
            yield Finding("python", requirement.name, "warning", found, remedy=f"pip install '{wanted}'", required=True)
        else:
            yield Finding("python", requirement.name, "ok", version, required=True)
    for name, (needed_for, remedy) in _OPTIONAL.items():
        version = machine.installed(name)
        if version is None:
            yield Finding("python", name, "missing", "not installed", needed_for, remedy)
        else:
            yield Finding("python", name, "ok", version, needed_for)


_TORCH = """
import json, torch
print(json.dumps({"cuda": torch.version.cuda, "available": torch.cuda.is_available(),
 "devices": [[torch.cuda.get_device_name(i), "%d.%d" % torch.cuda.get_device_capability(i)]
             for i in range(torch.cuda.device_count())]}))
"""
_ORT = "import json, onnxruntime; print(json.dumps({'providers': onnxruntime.get_available_providers()}))"
_TENSORRT = """
import json, {0} as trt
from scconv_deploy.runtimes.tensorrt.rtx_library import resolve
trt.Logger()
print(json.dumps({{"version": trt.__version__, "no_plugins": resolve() if "{0}" == "tensorrt_rtx" else ""}}))
"""


def _runtimes(machine: Machine) -> Iterator[Finding]:
    torch = machine.asked_child(_TORCH)
    if torch is None:
        yield Finding("runtime", "pytorch", "missing", "torch does not import", "everything", "pip install torch", True)
    else:
        build = f"CUDA {torch['cuda']} build" if torch["cuda"] else "CPU build"
        yield Finding("runtime", "pytorch", "ok", build + (", GPU usable" if torch["available"] else ""))
    ort = machine.asked_child(_ORT)
    if ort is None:
        remedy = "pip install onnxruntime"
        yield Finding("runtime", "onnxruntime-run", "missing", "does not import", "verification", remedy, True)
    else:
        yield Finding("runtime", "onnxruntime-run", "ok", ", ".join(ort["providers"]))
    for package, facts in BACKENDS.items():
        if machine.installed(package) is None:
            continue
        answer = machine.asked_child(_TENSORRT.format(facts.module))
        if answer is None:
            found = "installed, but its libraries do not load"
            yield Finding("runtime", f"{package}-run", "missing", found, "engines", facts.install)
        elif answer["no_plugins"]:
            found = f"{answer['version']}, takes no plugins: {answer['no_plugins']}"
            yield Finding("runtime", f"{package}-run", "warning", found, remedy="build without --plugin")
        else:
            yield Finding("runtime", f"{package}-run", "ok", f"{answer['version']}, takes the fused SRU's plugin")


def _cpu(machine: Machine) -> Iterator[Finding]:
    found = int8_instructions(machine.root)
    if not found.known:
        return
    if found.saturating:
        text = f"{found}, no VNNI: ONNX Runtime's int8 kernels add two products in 16 bits, which saturate silently"
        remedy = "int8 for this CPU: quantize --target cpu --reduce-range; int8 for GPUs is judged in float arithmetic"
        yield Finding("cpu", "int8", "warning", text, remedy=remedy)
    else:
        text = f"{found}: sums of int8 products in 32 bits" if found.names else f"{found}: int8 is slow here"
        yield Finding("cpu", "int8", "ok", text)


def _gpus(machine: Machine) -> Iterator[Finding]:
    query = "name,compute_cap,driver_version,memory.total"
    output = machine.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"])
    for line in (output or "").splitlines():
        name, capability, driver, memory = (part.strip() for part in line.split(","))
        yield Finding("gpu", name, "ok", f"compute capability {capability}, driver {driver}, {memory}")
    linux = jetson_linux(machine)
    if linux is not None:
        yield Finding("gpu", "jetson", "ok", f"L4T R{linux} ({jetpack_of(linux) or 'a JetPack not known here'})")
    elif not output:
        remedy = "install NVIDIA's driver; without a GPU, ONNX Runtime and tensorrt-rtx's builder still work"
        yield Finding("gpu", "gpu", "missing", "nvidia-smi reports none", "running engines and the plugin", remedy)


def _compilers(machine: Machine) -> Iterator[Finding]:
    nvcc = find_nvcc(machine)
    release = re.search(r"release (\d+\.\d+)", machine.run([nvcc, "--version"]) or "") if nvcc else None
    if nvcc and release:
        yield Finding("compiler", "nvcc", "ok", f"CUDA {release[1]} at {nvcc}")
    else:
        remedy = f"{CUDA_WHEELS}, or NVIDIA's CUDA toolkit"
        found = f"{nvcc} does not run" if nvcc else "not found"
        yield Finding("compiler", "nvcc", "missing", found, "building the fused SRU", remedy)
    for name, remedy in (("g++", "apt install g++"), ("cmake", "pip install cmake")):
        place = machine.which(name)
        if place is None:
            yield Finding("compiler", name, "missing", "not found", "building the fused SRU", remedy)
        else:
            first = (machine.run([place, "--version"]) or "").splitlines()[:1]
            yield Finding("compiler", name, "ok", first[0] if first else place)
    headers, unused = find_tensorrt_headers(machine), unused_tensorrt_include(machine)
    if headers is None:
        remedy = "apt install libnvinfer-headers-dev, or set TENSORRT_INCLUDE_DIR to NVIDIA/TensorRT's include folder"
        yield Finding(
            "compiler", "tensorrt-headers", "missing", unused or "no NvInfer.h found", "building the plugin", remedy
        )
    elif unused:
        found = f"{headers[1]} at {headers[0]}; {unused}"
        yield Finding(
            "compiler", "tensorrt-headers", "warning", found, remedy="correct TENSORRT_INCLUDE_DIR, or unset it"
        )
    else:
        yield Finding("compiler", "tensorrt-headers", "ok", f"{headers[1]} at {headers[0]}")


# --- what contradicts --------------------------------------------------------------------------------------------


def _contradictions(machine: Machine, findings: Sequence[Finding]) -> Iterator[Finding]:
    by_name = {finding.name: finding for finding in findings if finding.status == "ok"}
    gpus = [f for f in findings if f.group == "gpu" and f.found.startswith("compute capability")]
    if machine.installed("onnxruntime") and machine.installed("onnxruntime-gpu"):
        found = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files"
        remedy = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
        yield Finding("versions", "onnxruntime-gpu", "warning", found, remedy=remedy)
    torch = by_name.get("pytorch")
    if gpus and torch and torch.found.startswith("CPU"):
        remedy = "pip install --force-reinstall torch"
        yield Finding("versions", "torch", "warning", "a GPU is present, but torch is a CPU build", remedy=remedy)
    driver = re.search(r"CUDA Version: (\d+)\.(\d+)", machine.run(["nvidia-smi"]) or "") if gpus else None
    if driver:
        for name, pattern in (("pytorch", r"CUDA (\d+)\.(\d+) build"), ("nvcc", r"CUDA (\d+)\.(\d+) at")):
            built = re.search(pattern, by_name[name].found) if name in by_name else None
            if built and int(built[1]) > int(driver[1]):
                found = f"{name} is of CUDA {built[1]}.{built[2]}, the driver's is {driver[1]}.{driver[2]}"
                yield Finding("versions", name, "warning", found, remedy="update the driver, or use an older CUDA")
    library, headers = by_name.get("tensorrt"), by_name.get("tensorrt-headers")
    if library and headers and _major(library.found) != _major(headers.found):
        found = f"TensorRT is {library.found}, its headers {headers.found.split()[0]}"
        yield Finding("versions", "tensorrt-headers", "warning", found, remedy="set TENSORRT_INCLUDE_DIR to its own")
    for gpu in gpus:
        capability = gpu.found.split()[2].rstrip(",")
        if "tensorrt-rtx" in by_name and capability not in RTX_COMPUTE_CAPABILITIES:
            found = f"TensorRT-RTX has no support for compute capability {capability} ({gpu.name})"
            yield Finding("versions", "tensorrt-rtx", "warning", found, remedy="use tensorrt on this GPU")


def _major(found: str) -> int | None:
    try:
        return Version(found.split()[0]).major
    except InvalidVersion:
        return None
