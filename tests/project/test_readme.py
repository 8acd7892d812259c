"""README's commands do what README says."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from scconv_deploy.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
COMMANDS = [line for block in re.findall(r"```console\n(.*?)```", README, re.S) for line in block.splitlines()]
RUNNABLE = [line for line in COMMANDS if line.startswith("scconv-deploy") and "resnet20" in line]


def test_there_are_two_set_up_commands_and_ci_runs_the_second():
    setup = [line for line in COMMANDS if line.startswith("python3 -m venv")]
    assert len(setup) == 2
    assert setup[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_next_commands_run_in_order(tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="--data photos takes the photographs that scikit-learn ships")
    monkeypatch.chdir(tmp_path)
    assert len(RUNNABLE) == 5
    runner = CliRunner()
    outputs = []
    for line in RUNNABLE:
        result = runner.invoke(app, shlex.split(line)[1:])
        assert result.exit_code == 0, (line, result.output)
        outputs.append(result.output)
    exported, verified, artifact, model, embedded = outputs
    assert "ScConv has its initial values" in embedded
    assert "resnet20.onnx: 9 SRUs as nodes" in exported
    assert re.search(r"parity +passed", verified)
    assert "function   scconv::SRU: 64 nodes" in artifact
    assert "scconv_resnet20: 154,810 parameters" in model
