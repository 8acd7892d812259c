"""plugin build and plugin check on the command line: output, exit codes, and the compiler's lines."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from scconv_deploy import cli
from tests.trt_plugins.test_build import NVCC

VERSION = "".join(f"#define NV_TENSORRT_{part} 10\n" for part in ("MAJOR", "MINOR", "PATCH"))


@pytest.fixture
def run(monkeypatch, tmp_path):
    """The command line on a machine with a stand-in for nvcc on PATH, and no GPU."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(NVCC)
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", f"{nvcc.parent}:/usr/bin:/bin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def runner(*args):
        monkeypatch.setattr("sys.argv", ["scconv-deploy", *map(str, args)])
        return CliRunner().invoke(cli.app, [str(arg) for arg in args])

    return runner


def test_build_prints_what_was_built(run, tmp_path):
    output = tmp_path / "libmine.so"
    result = run("plugin", "build", "--kernels-only", "--arch", "89, 87", "-o", output)
    assert result.exit_code == 0, result.output
    assert f"{output}: sm_87, sm_89, CUDA 13.0.88, kernels only" in result.stdout
    document = json.loads(run("plugin", "build", "--kernels-only", "--arch", "89", "--json").stdout)
    assert (document["architectures"], document["tensorrt"], document["cached"]) == (["89"], None, False)
    assert document["path"].startswith(str(tmp_path / "cache"))


def test_a_compiler_that_fails_is_exit_5_with_its_lines(run, tmp_path):
    (tmp_path / "bin" / "fail").touch()
    result = run("plugin", "build", "--kernels-only", "--arch", "89", "-o", tmp_path / "libmine.so")
    assert result.exit_code == 5
    lines = result.stderr.splitlines()
    assert lines[0] == "sru.cu(3): error: expected a ';'"
    assert lines[-1].startswith("scconv-deploy: nvcc could not build the fused SRU: sru.cu(3): error")
    assert not (tmp_path / "libmine.so").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "reason"),
    [
        (("--kernels-only", "--register", "--arch", "89"), 2, "Leave --kernels-only or --register out."),
        (
            ("--kernels-only", "--tensorrt-include", "x", "--arch", "89"),
            2,
            "Leave --kernels-only or --tensorrt-include",
        ),
        (("--kernels-only", "--arch", "12"), 2, "It knows 75, 87, 89."),
        (("--kernels-only", "--arch", " "), 2, "--arch ' ': it names no architecture. Write for example --arch 87,89"),
        (("--kernels-only", "--arch", "87,"), 2, "--arch '87,': its part 2 is empty."),
        (("--kernels-only", "--arch", " ,87"), 2, "--arch ' ,87': its part 1 is empty."),
        (("--tensorrt-include", ".", "--arch", "89"), 2, "holds no NvInfer.h"),
        (("--arch", "89", "-o", "."), 2, "is a folder"),
    ],
)
def test_what_cannot_be_built(run, arguments, code, reason):
    result = run("plugin", "build", *arguments)
    assert (result.exit_code, reason in result.stderr) == (code, True), result.stderr


def test_headers_taken_from_elsewhere_are_noted(run, monkeypatch, tmp_path):
    monkeypatch.setenv("TENSORRT_INCLUDE_DIR", "/nope")
    for name, text in (("NvInfer.h", ""), ("NvInferVersion.h", VERSION)):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("scconv_deploy.system.machine._TENSORRT_INCLUDES", (str(tmp_path),))
    result = run("plugin", "build", "--arch", "89", "-o", tmp_path / "libmine.so")
    assert result.exit_code == 0, result.output
    assert f"note   TENSORRT_INCLUDE_DIR=/nope holds no NvInfer.h; taken were those in {tmp_path}\n" in result.stdout


def test_check_of_no_library_is_exit_7(run, tmp_path):
    file = tmp_path / "text.so"
    file.write_text("text")
    result = run("plugin", "check", file, "--json")
    assert result.exit_code == 7
    assert json.loads(result.stdout)["error"]["message"] == f"{file} is no 64-bit Linux shared library."
    assert run("plugin", "check", tmp_path / "nothing.so").exit_code == 2


@pytest.mark.nvcc
def test_check_shows_each_answer(harness):
    result = CliRunner().invoke(cli.app, ["plugin", "check", str(harness.plugin)])
    assert result.exit_code == 0, result.output
    for row in ("entry points and C interface", "no symbol of libnvinfer needed", "GPU code", "runs on"):
        assert row in result.stdout
    document = json.loads(CliRunner().invoke(cli.app, ["plugin", "check", str(harness.plugin), "--json"]).stdout)
    assert document["verdict"] == "passed"
    assert "libc.so.6" in document["needed"]
