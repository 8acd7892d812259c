"""plugin build --cpu and plugin check of what it wrote: the cache, missing and failing compilers, the commands."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from scconv_deploy import cli
from scconv_deploy.errors import BuildError, MissingRuntimeError, UsageError
from scconv_deploy.gate.gate import Gate
from scconv_deploy.gate.variant import VARIANTS
from scconv_deploy.system.machine import Machine
from scconv_deploy.trt_plugins.cpu import build as builds
from scconv_deploy.trt_plugins.cpu.build import CPU_LIBRARY, CPU_SOURCES, WIDTHS, build_cpu, built_cpu_library
from scconv_deploy.trt_plugins.cpu.check import check_cpu_library, is_cpu_library
from scconv_deploy.trt_plugins.cpu.library import SruCpuLibrary
from tests.trt_plugins.cpu.test_library import draw, run

COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo "c++ (stand-in) 1.0"; exit 0; }
[ -e "$(dirname "$0")/fail" ] && { echo "sru.cpp:3: error: no such thing"; echo "further"; exit 1; }
echo "$@" >> "$(dirname "$0")/calls"
for word; do [ "$before" = -o ] && echo product > "$word"; before=$word; done
"""


@pytest.fixture
def compiler(tmp_path) -> Path:
    """A stand-in for a C++ compiler; it notes how it was called, and fails where a file ``fail`` lies beside it."""
    path = tmp_path / "bin" / "c++"
    path.parent.mkdir()
    path.write_text(COMPILER)
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(compiler, tmp_path) -> Machine:
    return Machine(environ={"CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")})


def test_a_build_is_kept_and_used_again(machine, compiler):
    assert built_cpu_library(machine) is None
    first, second = build_cpu(machine=machine), build_cpu(machine=machine)
    assert (first.cached, second.cached, second.path) == (False, True, first.path)
    assert (first.path.name, first.compiler) == (CPU_LIBRARY, "c++ (stand-in) 1.0")
    assert built_cpu_library(machine) == first.path
    assert len((compiler.parent / "calls").read_text().splitlines()) == 2 + len(builds.widths()) + 1


def test_each_width_is_compiled_for_its_instructions_and_nothing_is_contracted(machine, compiler, tmp_path):
    build_cpu(tmp_path / "libmine.so", machine=machine)
    calls = {re.search(r"\S+\.cpp|-shared", line)[0]: line for line in (compiler.parent / "calls").open()}
    assert Path(tmp_path / "libmine.so").read_text() == "product\n"
    assert "-soname=libmine.so" in calls.pop("-shared")
    for source, line in calls.items():
        assert "-ffp-contract=off" in line
        assert [word for word in line.split() if word.startswith("-m")] == list(WIDTHS.get(Path(source).name, ()))


def test_another_compiler_or_flag_is_another_build(machine, compiler, monkeypatch):
    first = build_cpu(machine=machine).path
    compiler.write_text(COMPILER.replace("1.0", "2.0"))
    second = build_cpu(machine=machine)
    monkeypatch.setattr(builds, "FLAGS", (*builds.FLAGS, "-g"))
    third = build_cpu(machine=machine)
    assert len({first, second.path, third.path}) == 3
    assert (second.cached, third.cached) == (False, False)


def test_changed_sources_are_another_build(machine, tmp_path, monkeypatch):
    first = build_cpu(machine=machine).path
    shutil.copytree(CPU_SOURCES, tmp_path / "cpu")
    monkeypatch.setattr(builds, "CPU_SOURCES", tmp_path / "cpu")
    assert built_cpu_library(machine) == first
    (tmp_path / "cpu" / "width.h").write_text("")
    assert built_cpu_library(machine) is None


def test_without_a_compiler_it_says_so(tmp_path):
    with pytest.raises(MissingRuntimeError) as missing:
        build_cpu(machine=Machine(which=lambda name: None, environ={"XDG_CACHE_HOME": str(tmp_path)}))
    assert missing.value.message == "No C++ compiler was found (CXX, g++, clang++)."
    assert missing.value.remedy == "apt install g++, or name one in CXX."


def test_a_compiler_that_fails_leaves_nothing(machine, compiler, tmp_path):
    (compiler.parent / "fail").touch()
    with pytest.raises(BuildError) as failed:
        build_cpu(machine=machine)
    assert failed.value.message.startswith(
        "c++ could not build the fused SRU for CPUs: sru.cpp:3: error: no such thing"
    )
    assert "further" in failed.value.details
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_an_existing_output_is_kept(machine, tmp_path):
    (tmp_path / "lib.so").write_text("mine")
    with pytest.raises(UsageError, match="exists"):
        build_cpu(tmp_path / "lib.so", machine=machine)
    build_cpu(tmp_path / "lib.so", force=True, machine=machine)
    assert (tmp_path / "lib.so").read_text() == "product\n"


def test_a_real_library_passes_every_check(cpu_path):
    report = check_cpu_library(cpu_path)
    assert report, report.failures
    assert [row.verdict for row in report.rows] == ["passed"] * 5
    assert re.search(r"3 operators, vectors of (4|8|16) floats, \S+ from the functions", report.rows[-1].found)


def without_kernels(library: Path, path: Path) -> Path:
    """The library with its C interface's last function under another name."""
    path.write_bytes(library.read_bytes().replace(b"\0scconv_sru_cpu_run\0", b"\0scconv_sru_cpu_ran\0"))
    return path


def test_a_library_without_kernels_fails_and_is_not_loaded(cpu_path, tmp_path):
    path = without_kernels(cpu_path, tmp_path / "lib.so")
    assert is_cpu_library(path)
    report = check_cpu_library(path)
    assert "scconv_sru_cpu_run" in report.failures[0].found
    assert (report.rows[-1].verdict, report.rows[-1].found) == ("not run", "its symbols are wrong")


def test_a_library_that_computes_otherwise_fails(cpu_path, tmp_path):
    """Its operators take each other's names."""
    data = cpu_path.read_bytes()
    assert data.count(b"\0SRUNorm\0") == data.count(b"\0SRUSoft\0") == 1
    swapped = data.replace(b"\0SRUNorm\0", b"\0SRU?\0").replace(b"\0SRUSoft\0", b"\0SRUNorm\0")
    swapped = swapped.replace(b"\0SRU?\0", b"\0SRUSoft\0")
    (tmp_path / "lib.so").write_bytes(swapped)
    (row,) = check_cpu_library(tmp_path / "lib.so").failures
    assert row.name == "runs in onnxruntime"
    assert float(re.search(r"(\S+) from the functions", row.found)[1]) > 0.01


def test_the_command_line(machine, cpu_path, tmp_path, monkeypatch):
    for name, value in machine.environ.items():
        monkeypatch.setenv(name, value)

    def call(*args):
        monkeypatch.setattr("sys.argv", ["scconv-deploy", *map(str, args)])
        return CliRunner().invoke(cli.app, [str(arg) for arg in args])

    built = json.loads(call("plugin", "build", "--cpu", "--json").stdout)
    assert built["path"] == str(built_cpu_library(machine))
    assert "for CPUs, c++ (stand-in) 1.0, from the cache" in call("plugin", "build", "--cpu").stdout
    for option in (("--arch", "89"), ("--kernels-only",), ("--register",), ("--tensorrt-include", "x")):
        refused = call("plugin", "build", "--cpu", *option)
        assert (refused.exit_code, option[0] in refused.stderr) == (2, True)
    assert call("plugin", "check", cpu_path).exit_code == 0
    wrong = call("plugin", "check", without_kernels(cpu_path, tmp_path / "lib.so"))
    assert (wrong.exit_code, "plugin build --cpu" in wrong.stderr) == (7, True)


def test_clang_builds_what_gcc_builds(cpu_library, tmp_path):
    found = next(
        filter(None, (shutil.which(f"clang++{end}") for end in ("", *(f"-{n}" for n in range(30, 10, -1))))), ""
    )
    if not found:
        pytest.skip("clang++ is not installed")
    built = build_cpu(tmp_path / "libclang.so", machine=Machine(environ={"CXX": found}))
    assert "clang" in built.compiler
    other = SruCpuLibrary(built.path)
    x, gamma, beta = draw((2, 16, 30, 23))
    for name in VARIANTS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            gate = Gate(VARIANTS[name], gamma, beta)
            y, expected = (run(library, x.to(dtype), gate) for library in (other, cpu_library))
            assert torch.equal(y, expected)
