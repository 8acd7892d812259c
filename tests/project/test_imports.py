"""The layers of CONTRIBUTING.md, held by import-linter, and declared dependencies, held by deptry."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "scconv_deploy"


def test_imports_go_one_way(capfd):
    cli = pytest.importorskip("importlinter.cli")
    code = cli.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)
    assert code == 0, capfd.readouterr().out


def test_imports_that_break_the_contracts_are_found(tmp_path):
    """Upwards, upwards for types alone, torch on the device, a circle, and a room that does not say where it stands."""
    pytest.importorskip("importlinter")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__", "sru"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for path, text in (
        ("gate/cut.py", "from scconv_deploy.report import text"),
        ("graph/order.py", "if TYPE_CHECKING:\n    from scconv_deploy.model.spec import ModelSpec"),
        ("bundle/device/plan.py", "import torch"),
        ("gate/variant.py", "from scconv_deploy.gate import cut"),
        ("attic/__init__.py", ""),
    ):
        changed = tmp_path / PACKAGE.name / path
        changed.parent.mkdir(exist_ok=True)
        with changed.open("a") as file:
            file.write(f"\n{text}\n")
    code = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    said = " ".join(result.stdout.split())
    for words in ("gate.cut -> scconv_deploy.report", "graph.order -> scconv_deploy.model", "device.plan -> torch",
                  "No cycles are allowed in scconv_deploy.gate", "attic"):  # fmt: skip
        assert words in said, said


def test_what_is_imported_is_declared_and_what_is_declared_is_imported():
    pytest.importorskip("deptry")
    result = subprocess.run(
        [sys.executable, "-m", "deptry", "."], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_contributing_shows_the_layers():
    layers = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]["layers"]
    lines = [line.strip() for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines()]
    at = [next(i for i, line in enumerate(lines) if line.split("  ")[0] == layer) for layer in layers]
    assert at == sorted(at)


def test_rooms_stay_small():
    assert len(list(PACKAGE.glob("*.py"))) <= 6
    assert len(list((PACKAGE / "verification").glob("*.py"))) <= 12
