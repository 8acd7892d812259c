"""What a command says of weights: a line on stderr, the JSON document, the report, and the exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from scconv_deploy.model.load import load
from scconv_deploy.model.spec import ModelSpec
from tests.command_line import failed, run

NET = """
import torch
from torch import nn
from scconv_deploy.nn import SRU

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), SRU(8, 4))
"""
SHAPE = ("--input", "2x3x8x8")


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("said_net.py").write_text(NET)
    yield load(ModelSpec("said_net.py:make", seed=9)).state_dict()
    sys.modules.pop("said_net", None)


def half_of(state):
    torch.save({("x." if k.startswith("0.") else "1.") + k[2:]: v for k, v in state.items()}, "half.pt")
    return "half.pt"


def inspected(*arguments):
    return run("inspect", "said_net.py:make", *SHAPE, *arguments)


def test_what_was_read_is_one_line_on_stderr(state):
    torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}}, "w.pth.tar")
    result = inspected("--weights", "w.pth.tar")
    line = "weights w.pth.tar: 4 of 4 tensors loaded, from its entry state_dict, prefix module. taken off"
    assert result.exit_code == 0
    assert line in result.stderr.splitlines()
    assert "random initialisation" not in result.stdout


def test_half_of_a_model_is_said_everywhere(state):
    weights = half_of(state)
    failed(inspected("--weights", weights), 4, "2 missing (0.weight, 0.bias); 2 unexpected (x.weight, x.bias)")
    result = inspected("--weights", weights, "--non-strict", "--json")
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()  # no progress beside --json
    for words in ("2 of 4 tensors loaded", "missing: 2 (0.weight, 0.bias)", "unexpected: 2 (x.weight, x.bias)"):
        assert words in line
    assert "random initialisation (seed 0): 224 of 240 parameters, in 2 (0.weight, 0.bias)" in line
    document = json.loads(result.stdout)
    assert document["weights"] == [
        "weights half.pt: 2 of 4 tensors loaded",
        "weights: random initialisation (seed 0): 224 of 240 parameters",
    ]
    (stage, *_) = document["stages"]
    assert ["weights half.pt: missing", "2 (0.weight, 0.bias)"] in stage["skipped"]
    assert ["weights half.pt: unexpected", "2 (x.weight, x.bias)"] in stage["skipped"]
    assert not inspected("--weights", weights, "--non-strict", "--quiet").output


def test_half_of_a_model_is_in_the_report(state):
    result = run("deploy", "said_net.py:make", *SHAPE, "-o", "out", "--weights", half_of(state), "--non-strict")
    assert result.exit_code == 0, result.output
    assert "2 of 4 tensors loaded" in result.stderr
    assert "weights  random initialisation (seed 0): 224 of 240 parameters\n" in result.stdout
    report = json.loads(Path("out/report.json").read_text())
    assert report["provenance"]["weights"] == (
        "weights half.pt: 2 of 4 tensors loaded; weights: random initialisation (seed 0): 224 of 240 parameters"
    )
    assert ["weights half.pt: missing", "2 (0.weight, 0.bias)"] in report["stages"][0]["skipped"]


def test_two_that_fit(state):
    torch.save({"model": state, "ema": {k: v + 1 for k, v in state.items()}}, "w.pt")
    failed(inspected("--weights", "w.pt"), 2, "Choose one: --weights-key model or --weights-key ema.")
    result = inspected("--weights", "w.pt", "--weights-key", "ema")
    assert result.exit_code == 0
    assert "from its entry ema" in result.stderr
    failed(inspected("--weights", "w.pt", "--weights-key", "emo"), 2, "It holds model, ema.")
    failed(inspected("--weights-key", "ema"), 2, "--weights-key chooses among weights, and none are given.")


def test_a_model_without_weights_is_called_random(state):
    result = inspected("--seed", "3")
    assert "weights  random initialisation (seed 3): 232 of 240 parameters\n" in result.stdout
    assert "weights" not in result.stderr
    document = json.loads(inspected("--json").stdout)
    assert document["weights"] == ["weights: random initialisation (seed 0): 232 of 240 parameters"]
    exported = run("export", "said_net.py:make", *SHAPE, "-o", "net.onnx")
    assert "weights  random initialisation (seed 0): 232 of 240 parameters\n" in exported.stdout


@pytest.mark.parametrize("trust", [(), ("--trust-checkpoint",)])
def test_torchscript_is_told_at_once(state, trust):
    model = load(ModelSpec("said_net.py:make"))
    torch.jit.trace(model, torch.zeros(2, 3, 8, 8), check_trace=False).save("traced.pt")
    failed(run("export", "traced.pt", *SHAPE, "-o", "net.onnx", *trust), 4, "traced.pt is a TorchScript archive")
