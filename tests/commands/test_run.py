"""``scconv-deploy run`` as a user gives it: real cells, the overview, the second run, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import failed, run

NET = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
"""
FILE = """
[run]
output = "release"
jobs = 1

[defaults]
input = "1x3x4x4"

[[models]]
name = "net"
model = "net.py:make"

[[variants]]
name = "half"
precision = "fp16"

[[variants]]
name = "engine"
target = "sm89"
"""


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("net.py").write_text(NET)
    Path("release.toml").write_text(FILE)


def test_a_run_from_its_plan_to_the_second_one():
    planned = run("run", "release.toml", "--dry-run")
    lines = planned.output.splitlines()
    assert planned.exit_code == 0
    half = "scconv-deploy deploy net.py:make --input=1x3x4x4 --precision=fp16 -o release/net/half"
    assert lines[0] == f"net/half: {half}"
    assert not Path("release").exists()

    first = run("run", "release.toml", "--json", "--bench")
    found = json.loads(first.stdout)
    assert first.exit_code == found["exit_code"] == 2  # the command line's own complaint about a target without engines
    half_cell, other = found["cells"]
    assert (half_cell["status"], half_cell["facts"]["artifact"]) == ("passed", "model.onnx")
    assert (other["status"], other["exit_code"]) == ("error", 2)
    assert other["message"] == "--target sm89 is for engines, and none is asked for."
    report = json.loads(Path("release/net/half/report.json").read_text())
    assert report["provenance"]["command"] == half
    assert [link["status"] for link in report["links"] if link["name"] == "precision"] == ["passed"]
    assert "net.py" in half_cell["inputs"]["files"]
    assert half_cell["peak_bytes"] > 1e8
    assert half_cell["facts"]["latency_ms"].keys() == {"onnxruntime"}
    assert 0 < half_cell["facts"]["latency_ms"]["onnxruntime"] < 1e3
    assert {"torch", "onnx", "scconv-deploy"} <= set(half_cell["inputs"]["packages"])

    again = run("run", "release.toml", "--dry-run").output.splitlines()
    assert again[0] == "net/half: unchanged"
    assert again[1].startswith("net/engine: scconv-deploy deploy")
    same = run("report", "diff", "release", "release")
    assert "no difference" in same.output

    Path("net.py").write_text(NET.replace("3, 4, 1", "3, 5, 1"))
    assert "unchanged" not in run("run", "release.toml", "--dry-run").output


def test_nothing_to_do_needs_no_process(monkeypatch):
    """The second run makes nothing: it reads hashes, and exits with what it read."""
    from scconv_deploy.workflows import run as workflow
    from tests.workflows.cells import make

    text = FILE.replace('model = "net.py:make"', 'model = "wrong"').partition('[[variants]]\nname = "engine"')[0]
    Path("release.toml").write_text(text.replace('input = "1x3x4x4"', "").replace('precision = "fp16"', ""))
    monkeypatch.setattr("scconv_deploy.commands.run.deploy_cell", make)
    failed(
        run("run", "release.toml", "--quiet"),
        6,
        "1 of 1 cells failed; the worst is net/half: release/net/half/model.on",
    )
    monkeypatch.setattr(workflow, "make_cell", None)
    monkeypatch.setattr("scconv_deploy.commands.workers.WorkerOptions.workers", None)
    result = run("run", "release.toml")
    assert result.exit_code == 6
    assert "1 cells: 1 failed" in result.stdout


def with_line(after, line):
    return FILE.replace(after, f"{after}\n{line}", 1)


@pytest.mark.parametrize(
    ("text", "options", "code", "words"),
    [
        (with_line('name = "half"', "opset = '18'"), (), 2, "line 15: opset is '18', expected an integer."),
        (
            with_line("jobs = 1", 'address = "10.0.0.1:1"'),
            (),
            2,
            "The address 10.0.0.1:1 is a Ray cluster's.",
        ),
        (FILE, ("--address", "here"), 2, "The address here is a Ray cluster's."),
        (FILE, ("--engine", "ray", "--address", "here"), 2, "The address 'here' is not HOST:PORT."),
        (FILE, ("--jobs", "0"), 2, "--jobs"),
        (FILE, ("--engine", "spark"), 2, "--engine"),
        (FILE.replace('"release"', '"/proc/release"'), (), 2, "/proc/release/run.json cannot be written"),
        (FILE.replace('"release"', '"net.py"'), (), 2, "net.py is not a folder"),
        (FILE.replace('"release"', '"."'), (), 2, ". exists and is not the folder of a run: it has no run.json."),
        (FILE.replace("[run]", "[run"), (), 7, "release.toml is not TOML"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(text, options, code, words):
    Path("release.toml").write_text(text)
    before = sorted(Path().rglob("*"))
    failed(run("run", "release.toml", *options), code, words)
    assert sorted(Path().rglob("*")) == before


def test_a_missing_run_file():
    failed(run("run", "none.toml"), 2, "none.toml does not exist. Name a run file (TOML).")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--jobs", "2"), "--jobs shares out the rows of --data for an ONNX file, and there are none."),
        (("--engine", "ray"), "--engine shares out the rows of --data"),
    ],
)
def test_verify_shares_out_rows_only(arguments, words):
    failed(run("verify", "net.onnx", "--reference", "net.py:make", *arguments), 2, words)


def test_a_run_and_a_bundle_are_not_compared():
    Path("release").mkdir()
    Path("release/run.json").write_text('{"schema_version": 1, "cells": []}')
    failed(run("report", "diff", "release", "net.py"), 2, "release is a run, and net.py is not.")
