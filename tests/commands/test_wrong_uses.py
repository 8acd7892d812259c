"""Wrong uses, as a stranger makes them: one line that names object, expected, found and remedy, and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from scconv_deploy.bundle.device import command_line
from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.trt_plugins.build import BuildRequest, build
from tests.command_line import failed, run
from tests.exporters.tensorrt.engines import conv_model, save
from tests.report.made import full_report
from tests.trt_plugins.test_build import NVCC, machine  # noqa: F401

NET = "from torch import nn\n\ndef make():\n    return nn.Conv2d(3, 4, 1)\n"
SHAPE = ("--input", "1x3x8x8")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("null.py").write_bytes(b"x = 1\0\n")
    Path("folder").mkdir()
    Path("folder.json").mkdir()
    save(conv_model(batch=1), tmp_path / "net.onnx")
    np.savez("shape.npz", x=np.zeros((4, 16, 9, 9), "float32"))
    np.savez("text.npz", x=np.array(["a"]))
    return tmp_path


BIG = "9" * 20
UNSET = "is empty, expected a value. Set the shell variable that it comes from, or leave the option out."
CASES = [
    # what an unset shell variable gives: a check that is left out in silence would pass
    (("verify", "net.onnx", "--digest", ""), 2, f"Argument 4 (--digest) {UNSET}"),
    (("verify", "net.onnx", "--digest="), 2, f"Argument 3 (--digest) {UNSET}"),
    (("deploy", "net.py:make", "-o", "out", "--data", ""), 2, f"Argument 6 (--data) {UNSET}"),
    (
        ("build", "net.onnx", "-o", "e", "--backend", "tensorrt-rtx", "--target", ""),
        2,
        f"Argument 8 (--target) {UNSET}",
    ),
    (("inspect", ""), 2, f"Argument 2 (inspect) {UNSET}"),
    (
        ("build", "net.onnx", "-o", "e", "--backend", "tensorrt-rtx", "--profile", "x"),
        2,
        "--profile 'x' is not NAME:MIN:",
    ),
    (("refit", "net.onnx", "--from", "net.onnx", "-o", "e"), 7, "net.onnx has no manifest net.onnx.json"),
    # no stdout for -
    (
        ("export", "net.py:make", "-o", "-", *SHAPE),
        2,
        "The output - would be a file of that name, not stdout. Name a file",
    ),
    (("deploy", "net.py:make", "-o", "-", *SHAPE), 2, "The output - would be a file of that name, not stdout."),
    # one kind for another
    (
        ("export", "net.onnx", "-o", "x.onnx"),
        2,
        "net.onnx is an artifact, expected a model: a zoo name, package.module",
    ),
    (("verify", "net.onnx", "--reference", "folder"), 2, "folder is a folder, expected a model: a zoo name"),
    (("export", "-", "-o", "x.onnx"), 2, "'-' is not a zoo model, package.module:factory"),
    (
        ("export", "null.py:make", "-o", "x.onnx", *SHAPE),
        4,
        "null.py is not Python: source code string cannot contain null bytes. C",
    ),
    (
        ("models", "--table", "folder.json"),
        2,
        "folder.json is a folder, expected a file. Name a file, for example folder.json/model.json.",
    ),
    (("doctor", "--require", "nvc"), 2, "--require 'nvc' is not known. Known: "),
    # huge numbers
    (
        ("export", "net.py:make", "-o", "x", *SHAPE, "--batch", f"1:2:{BIG}"),
        2,
        f"--batch '1:2:{BIG}': MAX is {BIG}, expected at most 2147483647.",
    ),
    (
        ("build", "net.onnx", "-o", "e", "--backend", "tensorrt-rtx", "--workspace", f"{BIG}G"),
        2,
        "bytes, which no machine has. Write for example 512M or 2G.",
    ),
    (("bench", "net.onnx", "--threads", BIG), 2, "less than or equal to 4096"),
    (("bench", "net.onnx", "--batch", BIG), 2, "less than or equal to 2147483647"),
    # options that mean nothing together
    (
        ("deploy", "net.py:make", "-o", "x", *SHAPE, "--deep", "3"),
        2,
        "--deep is for real data, and none is given. Add --data",
    ),
    (
        ("verify", "net.onnx", "--reference", "net.py:make", "--preprocessing", '{"std": [1]}'),
        2,
        "--preprocessing is for real data",
    ),
    (
        ("rewrite", "net.onnx", "-o", "x.onnx", "--weights", "w.pt", *SHAPE),
        2,
        "These options belong to a model: --weights, --input. Name it",
    ),
    (
        ("verify", "folder", "--seed", "3", "--deep", "1"),
        2,
        "These options belong to a model: --deep, --seed. Name it with --reference",
    ),
    (
        ("verify", "net.onnx", "--reference", "net.onnx", "--embed", "paper"),
        2,
        "and the reference is an ONNX file: --embed. Leave them out.",
    ),
    (
        ("quantize", "net.onnx", "-o", "x.onnx"),
        2,
        "There are no data to calibrate on, and scales made of noise are wrong",
    ),
    (
        ("quantize", "net.onnx", "-o", "x.onnx", "--data", "random", "--calibration", "mean"),
        2,
        "--calibration 'mean' is unknown. There are max, entropy and percentile[:99.99].",
    ),
    (
        ("quantize", "net.onnx", "-o", "x.onnx", "--data", "random", "--max-drop", "half"),
        2,
        "--max-drop 'half' is no share. Write 0.5% or 0.005.",
    ),
    (
        ("quantize", "net.onnx", "-o", "x.json", "--data", "random", "--report", "x.json"),
        2,
        "--report x.json is the model's own file. Name another file for the report.",
    ),
    (
        ("quantize", "net.onnx", "-o", "x.onnx", "--data", "random", "--weights", "w.pt"),
        2,
        "These options belong to a model: --weights. Name it with --reference MODEL.",
    ),
    (
        ("quantize", "net.onnx", "-o", "x.onnx", "--data", "shape.npz", "--budget", "half"),
        2,
        "--budget 'half' is neither a share nor decibels. Write 0.5% (accuracy lost;",
    ),
    (
        ("quantize", "net.onnx", "-o", "x.onnx", "--data", "shape.npz", "--budget", "1%", "--max-drop", "2%"),
        2,
        "--budget 1% judges the file too, so --max-drop 2% repeats or contradicts it. Leave --max-drop out",
    ),
    (
        ("quantize", "net.onnx", "-o", "x.onnx", "--data", "shape.npz", "--budget", "1%", "--tolerance", "max_drop=1"),
        2,
        "--budget 1% judges the file too, so --tolerance max_drop repeats or contradicts it.",
    ),
    (
        ("quantize", "net.onnx", "-o", "x.onnx", "--data", "random", "--budget", "1%"),
        2,
        "--budget 1% is about answers, and answers on noise say nothing. Give real --data, or --budget in decibels.",
    ),
    (
        ("export", "net.py:make", "-o", "x.onnx", *SHAPE, "--budget", "1%"),
        2,
        "--budget is for int8. Add --precision int8, or leave it out.",
    ),
    (("sensitivity", "net.onnx"), 2, "There are no data to calibrate on, and scales made of noise are wrong"),
    (("export", "net.py:make", "-o", "x.onnx", *SHAPE, "--precision", "int8"), 2, "There are no data to calibrate on"),
    (
        ("export", "net.py:make", "-o", "x.onnx", *SHAPE, "--only", "conv*"),
        2,
        "--only is for int8. Add --precision int8, or leave it out.",
    ),
    (
        ("export", "net.py:make", "-o", "x.onnx", *SHAPE, "--data", "shape.npz"),
        2,
        "--data is what int8 is calibrated on. Add --precision int8, or leave it out.",
    ),
    # wrong shape, wrong type
    (
        ("convert", "net.onnx", "-o", "x.onnx", "--precision", "fp16", "--data", "shape.npz"),
        2,
        "shape.npz: x is float32[4, 16, 9, 9], expected numbers [1, 16, 8, 8]. Save it in the input's",
    ),
    (
        ("convert", "net.onnx", "-o", "x.onnx", "--precision", "fp16", "--data", "text.npz"),
        2,
        "--data text.npz: x is <U1[1], expected numbers [1, 16, 8, 8].",
    ),
]


@pytest.mark.parametrize(("arguments", "code", "line"), CASES, ids=[" ".join(a)[:60] for a, _, _ in CASES])
def test_one_line_and_nothing_written(arguments, code, line, workplace):
    before = sorted(workplace.rglob("*"))
    if arguments[0] == "doctor":  # which prints what it found, and then what it lacks
        result = run(*arguments)
        assert result.exit_code == code
        assert line in result.stderr
    else:
        failed(run(*arguments), code, line)
    assert [path for path in sorted(workplace.rglob("*")) if "__pycache__" not in path.parts] == before


def test_finish_pyz_refuses_an_empty_digest_too(capsys):
    assert command_line.run(["folder", "--digest", ""]) == 2
    assert capsys.readouterr().err == f"finish.pyz: Argument 3 (--digest) {UNSET}\n"


def test_a_bundle_is_no_device(device_bundle):
    failed(
        run("report", "merge", device_bundle, device_bundle), 7, "names no bundle that it finished. Name the device/"
    )


def test_nvcc_that_does_not_answer(machine):  # noqa: F811
    """It needs a TMPDIR; "it knows ." was no remedy."""
    (machine.root / "cuda/bin/nvcc").write_text(NVCC.replace("printf", "true"))
    with pytest.raises(MissingRuntimeError, match="does not say which architectures it knows") as refused:
        build(BuildRequest(("89",), kernels_only=True), machine=machine)
    assert "TMPDIR" in refused.value.remedy


# --- what the shell does ---------------------------------------------------------------------------------------


def shell(line, **environment):
    line = line.replace("scconv-deploy", f"{sys.executable} -m scconv_deploy")
    return subprocess.run(["sh", "-c", line], env=os.environ | environment, capture_output=True, text=True, check=False)


def test_names_that_the_terminals_encoding_lacks():
    save(conv_model(batch=1), Path("süß ☃.onnx"))
    done = shell("scconv-deploy inspect 'süß ☃.onnx'", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("s\\xfc\\xdf \\u2603.onnx: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_help_on_a_full_disk():
    done = shell("scconv-deploy --help > /dev/full")
    assert (done.returncode, done.stderr) == (
        2, "scconv-deploy: stdout cannot be written: No space left on device. Print elsewhere.\n",
    )  # fmt: skip


def test_completion_is_no_closed_pipe():
    code = "import sys; sys.argv[0] = 'scconv-deploy'; from scconv_deploy.__main__ import main; main()"
    asked = {"_SCCONV_DEPLOY_COMPLETE": "complete_bash", "COMP_WORDS": "scconv-deploy de", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.split()) == (0, ["deploy"]), done.stderr


def test_a_folder_that_is_gone():
    done = shell(
        "mkdir gone && cd gone && rmdir ../gone && scconv-deploy models", PYTHONPATH=str(Path(__file__).parents[2])
    )
    assert done.returncode == 2
    assert done.stderr.startswith("scconv-deploy: The current folder cannot be read: No such file or directory. Go to")
    assert len(done.stderr.splitlines()) == 1


def test_a_limit_of_the_files_size_leaves_nothing(workplace):
    Path("report.json").write_bytes(full_report().as_bytes())
    before = sorted(workplace.iterdir())
    done = shell("ulimit -f 1 && scconv-deploy report show report.json -o big.html")
    assert done.returncode == 2
    assert done.stderr == "scconv-deploy: big.html cannot be written: File too large. Choose another place.\n"
    assert sorted(workplace.iterdir()) == before
