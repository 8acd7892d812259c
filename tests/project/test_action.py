"""The GitHub Action: its steps do what they say, run here by bash with a stand-in for the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from scconv_deploy.cli import app

ROOT = Path(__file__).parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())
STEPS = {step["name"]: step for step in ACTION["runs"]["steps"] if "name" in step}

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")


@pytest.fixture
def workspace(tmp_path):
    """A checkout with a run file, and a command that writes down what it is asked for."""
    (tmp_path / "release.toml").write_text('[run]\noutput = "out of it"\n')
    command = tmp_path / "scconv-deploy" / "bin" / "scconv-deploy"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > asked\nexit 6\n')
    command.chmod(0o755)
    return tmp_path


def run(step, workspace, **environment):
    files = {name: str(workspace / name) for name in ("GITHUB_OUTPUT", "GITHUB_STEP_SUMMARY")}
    usual = {"PATH": os.environ["PATH"], "RUNNER_TEMP": str(workspace), "GITHUB_REPOSITORY": "us/ours"}
    script = ["bash", "--noprofile", "--norc", "-e", "-o", "pipefail", "-c", STEPS[step]["run"]]
    return subprocess.run(script, cwd=workspace, env=usual | files | environment, capture_output=True, text=True)


def test_every_value_of_a_script_comes_from_the_environment():
    """An expression inside a script would be run as part of it, whatever a pull request wrote there."""
    for name, step in STEPS.items():
        assert "${{" not in step["run"], name
    given = {value for step in STEPS.values() for value in step["env"].values() if value.startswith("${{ inputs.")}
    assert {f"${{{{ inputs.{name} }}}}" for name in ACTION["inputs"]} - given == {"${{ inputs.python-version }}"}


def test_the_folder_is_the_run_files(workspace):
    found = run("Folder", workspace, RUN_FILE="release.toml")
    assert found.returncode == 0, found.stderr
    assert (workspace / "GITHUB_OUTPUT").read_text() == "folder=out of it\n"


def test_the_run_keeps_its_exit_code_and_its_arguments(workspace):
    found = run("Run", workspace, RUN_FILE="release.toml", ARGUMENTS="--jobs 2")
    assert found.returncode == 6
    assert (workspace / "asked").read_text().split("\n") == ["run", "release.toml", "--jobs", "2", ""]
    help_text = CliRunner().invoke(app, ["run", "--help"]).stdout
    assert "--jobs" in help_text


@pytest.mark.parametrize(("token", "number"), [("", "7"), ("secret", ""), ("secret", "7")])
def test_the_report_is_the_summary_and_with_a_token_a_comment(workspace, token, number):
    gh = workspace / "gh"
    gh.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{workspace}/comment"\n')
    gh.chmod(0o755)
    (workspace / "out of it").mkdir()
    (workspace / "out of it" / "summary.md").write_text("| cell | verdict |\n")
    path = f"{workspace}:{os.environ['PATH']}"
    found = run("Report", workspace, PATH=path, FOLDER="out of it", GH_TOKEN=token, PULL_REQUEST=number)
    assert found.returncode == 0, found.stderr
    assert (workspace / "GITHUB_STEP_SUMMARY").read_text() == "| cell | verdict |\n"
    assert (workspace / "comment").exists() == bool(token and number)
    if token and number:
        assert (workspace / "comment").read_text().split("\n")[:6] == [
            "pr", "comment", "7", "--repo", "us/ours", "--body-file",
        ]  # fmt: skip


def test_a_run_that_wrote_nothing_is_said(workspace):
    found = run("Report", workspace, FOLDER="out of it", GH_TOKEN="", PULL_REQUEST="")
    assert found.returncode == 0
    assert "There is no out of it/summary.md" in found.stdout


def test_its_extras_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(ACTION["inputs"]["extras"]["default"].split(",")) <= set(extras)
    assert "$GITHUB_ACTION_PATH/constraints.txt" in STEPS["Install"]["run"]
