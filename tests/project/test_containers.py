"""The Dockerfile names files and commands that exist; no image is built."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_the_image_installs_what_is_tested():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (version,) = re.findall(r"^FROM python:(\d+\.\d+)-slim$", DOCKERFILE, re.M)
    assert project["requires-python"] == f">={version}"
    (pattern,) = re.findall(r"grep '(.+?)'", DOCKERFILE)
    assert len(re.findall(pattern, (ROOT / "constraints.txt").read_text(), re.M)) == 1
    (extra,) = re.findall(r'"/opt/scconv-deploy\[(\w+)\]"', DOCKERFILE)
    assert extra in project["optional-dependencies"]
    assert "--constraint /opt/scconv-deploy/constraints.txt" in DOCKERFILE


def test_the_image_runs_the_command_line():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (command,) = json.loads(re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.M)[0])
    assert command in project["scripts"]


def test_nothing_that_the_build_needs_is_left_out():
    ignored = set((ROOT / ".dockerignore").read_text().split())
    assert not ignored & {"pyproject.toml", "constraints.txt", "README.md", "LICENSE", "scconv_deploy"}
