"""Building the plugin: which compiler, headers and architectures, the cache, and what is said when it fails.

A shell script stands for nvcc, so that this takes no compiler; test_plugin.py builds with the real one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from scconv_deploy.errors import BuildError, MissingRuntimeError, UsageError
from scconv_deploy.system.gpu import Gpu
from scconv_deploy.system.machine import Machine, find_nvcc
from scconv_deploy.trt_plugins import build as module
from scconv_deploy.trt_plugins.build import SOURCES, BuildRequest, build, built_libraries, compile_command, revision
from scconv_deploy.trt_plugins.elf import read_library
from scconv_deploy.trt_plugins.library import SruLibrary, SruParams
from tests.trt_plugins.conftest import unoptimised
from tests.trt_plugins.emulated import ONE_KERNEL, change_kernels

NVCC = r"""#!/bin/sh
case "$*" in
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;;
  --list-gpu-arch) printf 'compute_75\ncompute_87\ncompute_89\n'; exit 0;;
esac
echo "$@" >> "$(dirname "$0")/calls"
[ -e "$(dirname "$0")/fail" ] && { echo "sru.cu(3): error: expected a ';'" >&2; exit 2; }
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo "library $(wc -l < "$(dirname "$0")/calls")" > "$2"; shift; done
"""


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    """What the driver says, instead of this machine's: no GPU of its own, CUDA 13.0."""
    said = {"gpus": (), "cuda": (13, 0)}
    monkeypatch.setattr(module, "gpus", lambda: said["gpus"])
    monkeypatch.setattr(module, "driver_cuda", lambda: said["cuda"])
    return said


@pytest.fixture
def machine(tmp_path):
    """A machine with a compiler, TensorRT's headers and an Orin; `calls` are the compiler's command lines."""
    bin_folder = tmp_path / "cuda" / "bin"
    bin_folder.mkdir(parents=True)
    nvcc = bin_folder / "nvcc"
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    include = tmp_path / "usr" / "include"
    include.mkdir(parents=True)
    (include / "NvInfer.h").touch()
    write_version(include, "10", "3")

    def run(command):
        if command[0] == "nvidia-smi":
            return "8.7\n8.9\n8.7\n"
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return Machine(
        run=run,
        which=lambda name: None,
        environ={"CUDA_HOME": str(tmp_path / "cuda"), "XDG_CACHE_HOME": str(tmp_path / "cache")},
        root=tmp_path,
        site_packages=(),
    )


def write_version(include, major, minor):
    lines = (f"#define NV_TENSORRT_MAJOR {major}", f"#define NV_TENSORRT_MINOR {minor}", "#define NV_TENSORRT_PATCH 0")
    (include / "NvInferVersion.h").write_text("\n".join(lines))


def calls(machine):
    path = machine.root / "cuda" / "bin" / "calls"
    return path.read_text().splitlines() if path.exists() else []


def test_into_the_cache_once(machine):
    first = build(BuildRequest(), machine=machine)
    assert first.architectures == ("87", "89")  # of the GPUs present
    assert (first.cuda, first.tensorrt, first.cached) == ("13.0.88", "10.3.0", False)
    assert first.path.read_text() == "library 1\n"
    second = build(BuildRequest(), machine=machine)
    assert (second.cached, second.path, second.sha256, len(calls(machine))) == (True, first.path, first.sha256, 1)
    assert built_libraries(machine) == [first.path]
    assert f"-DSCCONV_SRU_REVISION={revision(SOURCES, '13.0.88')}" in calls(machine)[0]
    assert json.loads(json.dumps(second.as_json()))["path"] == str(first.path)


def test_gpus_that_nvidia_smi_does_not_tell_are_asked_of_the_driver(machine, driver):
    """Jetson's nvidia-smi says [N/A], a container may have none."""
    for answer in ("[N/A]\n", None):
        silent = replace(machine, run=lambda c, said=answer: said if c[0] == "nvidia-smi" else machine.run(c))
        with pytest.raises(MissingRuntimeError, match="There is no GPU to build for"):
            build(BuildRequest(), machine=silent)
        driver["gpus"] = (Gpu("Orin", "8.7"),)
        assert build(BuildRequest(), machine=silent).architectures == ("87",)
        driver["gpus"] = ()


def test_an_nvcc_newer_than_the_driver_builds_for_other_machines_only(machine, driver):
    driver["cuda"] = (12, 4)
    with pytest.raises(MissingRuntimeError, match=r"nvcc is of CUDA 13\.0\.88, the driver knows CUDA 12\.4") as refused:
        build(BuildRequest(), machine=machine)
    assert "an nvcc of CUDA 12 first on PATH" in refused.value.remedy
    assert build(BuildRequest(("89",)), machine=machine).architectures == ("89",)
    for enough in ((13, 1), None):
        driver["cuda"] = enough
        assert build(BuildRequest(), machine=machine).architectures == ("87", "89")


def test_a_folder_of_headers_that_is_none_is_said(machine, tmp_path):
    """TENSORRT_INCLUDE_DIR names another one than is taken, or there is none at all."""
    assert build(BuildRequest(), machine=machine).notes == ()
    lost = replace(machine, environ={**machine.environ, "TENSORRT_INCLUDE_DIR": "/nope"})
    here = tmp_path / "usr" / "include"
    assert build(BuildRequest(), machine=lost).notes == (
        f"TENSORRT_INCLUDE_DIR=/nope holds no NvInfer.h; taken were those in {here}",
    )
    assert build(BuildRequest(kernels_only=True), machine=lost).notes == ()
    assert build(BuildRequest(tensorrt_include=here), machine=lost).notes == ()
    right = replace(machine, environ={**machine.environ, "TENSORRT_INCLUDE_DIR": str(here)})
    assert build(BuildRequest(), machine=right).notes == ()
    (here / "NvInfer.h").unlink()
    with pytest.raises(MissingRuntimeError, match="were not found: TENSORRT_INCLUDE_DIR=/nope holds no NvInfer"):
        build(BuildRequest(), machine=lost)


def test_what_makes_another_library(machine):
    requests = [BuildRequest(), BuildRequest(("89",)), BuildRequest(kernels_only=True)]
    paths = [build(request, machine=machine).path for request in requests]
    write_version(machine.root / "usr" / "include", "11", "1")
    paths.append(build(BuildRequest(), machine=machine).path)
    assert len({*paths}) == 4
    assert len(calls(machine)) == 4


def test_the_command_line(machine, tmp_path):
    include = tmp_path / "include"
    command = compile_command("nvcc", ("87", "90", "120"), include, "libx.so", tmp_path / "out.so")
    assert [part for part in command if part.startswith("-gencode")] == [
        "-gencode=arch=compute_87,code=sm_87",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_120,code=sm_120",
        "-gencode=arch=compute_87,code=compute_87",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert str(SOURCES / "plugin" / "creator.cpp") in command
    assert command[command.index("-isystem") + 1] == str(include)
    kernels = compile_command("nvcc", ("87",), None, "libx.so", tmp_path / "out.so")
    assert [part for part in kernels if "code=compute" in part] == ["-gencode=arch=compute_87,code=compute_87"]
    assert not any("/plugin/" in part or part == "-isystem" for part in kernels)
    assert sum(part.endswith((".cu", ".cpp")) for part in kernels) == 4


def test_to_a_file_with_the_register_library_beside_it(machine, tmp_path):
    output = tmp_path / "out" / "libmine.so"
    result = build(BuildRequest(("89",), register=True), output, machine=machine)
    assert (result.path, result.register) == (output, tmp_path / "out" / "libmine_register.so")
    assert result.register.is_file()
    library, stub, register = calls(machine)
    assert "-soname=libmine.so" in library
    assert "libnvinfer.so.10" in stub
    assert "libnvinfer.so.10" in register
    assert "$ORIGIN" in register
    with pytest.raises(UsageError, match="exists"):
        build(BuildRequest(("89",)), output, machine=machine)
    assert len(calls(machine)) == 3
    build(BuildRequest(("89",)), output, force=True, machine=machine)
    assert output.read_text() == "library 4\n"


def test_a_failing_compiler_leaves_nothing_and_is_quoted(machine, tmp_path):
    (machine.root / "cuda" / "bin" / "fail").touch()
    output = tmp_path / "libmine.so"
    with pytest.raises(BuildError, match="expected a ';'") as caught:
        build(BuildRequest(("89",)), output, machine=machine)
    assert "sru.cu(3): error" in caught.value.details
    assert caught.value.exit_code == 5
    with pytest.raises(BuildError):
        build(BuildRequest(("89",)), machine=machine)
    assert not output.exists()
    assert built_libraries(machine) == []


def test_what_is_missing_is_named_with_its_remedy(machine, tmp_path):
    bare = Machine(
        run=lambda command: None, which=lambda name: None, environ={}, root=tmp_path / "no", site_packages=()
    )
    with pytest.raises(MissingRuntimeError, match=r"nvcc was not found.*pip install 'scconv-deploy\[cuda\]'") as caught:
        build(BuildRequest(), machine=bare)
    assert caught.value.exit_code == 3
    with pytest.raises(UsageError, match=r"no architecture '12'.*75, 87, 89"):
        build(BuildRequest(("12",)), machine=machine)
    with pytest.raises(UsageError, match=r"holds no NvInfer\.h"):
        build(BuildRequest(tensorrt_include=tmp_path), machine=machine)
    write_version(tmp_path / "usr" / "include", "10", "2")
    with pytest.raises(MissingRuntimeError, match=r"10\.2\.0, expected 10\.3"):
        build(BuildRequest(), machine=machine)
    (tmp_path / "usr" / "include" / "NvInfer.h").unlink()
    with pytest.raises(MissingRuntimeError, match="--tensorrt-include"):
        build(BuildRequest(), machine=machine)
    with pytest.raises(UsageError, match="register"):
        build(BuildRequest(kernels_only=True, register=True), machine=machine)
    without_gpu = Machine(
        run=lambda command: None if command[0] == "nvidia-smi" else machine.run(command), which=machine.which,
        environ=machine.environ, root=machine.root, site_packages=(),
    )  # fmt: skip
    with pytest.raises(MissingRuntimeError, match="--arch"):
        build(BuildRequest(kernels_only=True), machine=without_gpu)
    assert calls(machine) == []


@pytest.mark.parametrize(
    ("line", "status", "remedy"),
    [
        ("ptxas fatal   : Unsupported .version 9.4; current version is '9.0'", 1, r"several versions: pip install"),
        ("/tmp/x.cubin: No space left on device", 1, "Free some space in"),
        ("Killed", 255, "fewer architectures"),
        ("nvcc fatal   : unsupported GNU version", 1, "supports the host compiler"),
    ],
)
def test_each_failure_has_its_remedy(machine, line, status, remedy):
    nvcc = machine.root / "cuda" / "bin" / "nvcc"
    nvcc.write_text(NVCC.replace('echo "$@" >>', f'echo "{line}" >&2; exit {status}; echo "$@" >>'))
    with pytest.raises(BuildError, match=remedy):
        build(BuildRequest(("89",)), machine=machine)


def test_a_cache_that_cannot_be_written_is_refused_before_compiling(machine, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    with pytest.raises(UsageError, match="cannot be written"):
        build(BuildRequest(("89",)), machine=machine)
    assert calls(machine) == []


def test_an_interrupt_ends_the_compiler_and_its_children_and_leaves_nothing(machine, tmp_path):
    """The parent alone is told, as by `kill -INT`: a terminal would tell all of them."""
    nvcc = machine.root / "cuda" / "bin" / "nvcc"
    slow = 'sleep 60 & echo $! > "$(dirname "$0")/child"; echo left > "$TMPDIR/tmpxft"; wait; echo "$@" >>'
    nvcc.write_text(NVCC.replace('echo "$@" >>', slow))
    temporary, output = tmp_path / "temporary", tmp_path / "libmine.so"
    temporary.mkdir()
    environment = dict(machine.environ) | {"TMPDIR": str(temporary), "PATH": os.environ["PATH"]}
    code = (
        "from pathlib import Path; from scconv_deploy.system.machine import Machine; import sys\n"
        "from scconv_deploy.trt_plugins.build import BuildRequest, build\n"
        "machine = Machine(which=lambda name: None, root=Path('/nowhere'), site_packages=())\n"
        "build(BuildRequest(('89',), kernels_only=True), Path(sys.argv[1]), machine=machine)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, output], env=environment, stderr=subprocess.PIPE, text=True)
    child = nvcc.parent / "child"
    for _ in range(300):
        if child.exists() and child.read_text().strip() and list(temporary.rglob("tmpxft")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert list(temporary.iterdir()) == []
    assert not output.exists()
    command = Path(f"/proc/{child.read_text().strip()}/cmdline")
    assert not command.exists() or not command.read_bytes()  # gone, or dead and not yet collected


@pytest.mark.nvcc
def test_nvcc_of_pypis_wheels_builds_what_loads_where_no_other_is(tmp_path, monkeypatch):
    """The extra `cuda` alone: nothing on PATH but the host's compiler, no CUDA_HOME, no toolkit on the system.

    Not optimised, and of all kernels one operator's for float, for speed.
    """
    monkeypatch.setattr(module, "COMPILE_FLAGS", unoptimised(module.COMPILE_FLAGS))
    alone = Machine(which=lambda name: None, environ={"XDG_CACHE_HOME": str(tmp_path / "cache")}, root=tmp_path)
    if find_nvcc(alone) is None:
        pytest.skip("the extra `cuda` is not installed")
    sources = tmp_path / "sources"
    shutil.copytree(SOURCES, sources)
    change_kernels(sources, ONE_KERNEL)
    result = build(BuildRequest(("89",), kernels_only=True, sources=sources), machine=alone)
    found = read_library(result.path)
    assert (found.cubins, found.ptx) == (("8.9",), ("8.9",))
    params = SruParams(batch=1, channels=4, pixels=4, num_groups=2, ddof=1)
    assert SruLibrary(result.path).refusal(params) is None


def test_wheels_of_pypi_get_their_library_folder(machine, tmp_path):
    library = tmp_path / "cuda" / "lib"
    library.mkdir()
    (library / "libcudart_static.a").touch()
    build(BuildRequest(("89",)), machine=machine)
    assert f"-L{library}" in calls(machine)[0]
