"""The package as a whole: what it exports, what it imports, and where it lives."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import scconv_deploy

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "scconv_deploy"


def test_public_names_exist():
    for name in scconv_deploy.__all__:
        assert getattr(scconv_deploy, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        scconv_deploy.nonsense  # noqa: B018


def test_importing_the_package_and_the_command_line_does_not_load_torch():
    code = "import sys, scconv_deploy.cli; print('torch' in sys.modules, 'onnx' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("link", ["exporters", "trt_plugins", "cli.py"])
def test_the_root_links_into_the_package(link):
    assert (ROOT / link).is_symlink()
    assert (ROOT / link).resolve() == (PACKAGE / link).resolve()


def test_the_wheel_installs_the_package_alone():
    find_packages = pytest.importorskip("setuptools").find_packages
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    found = find_packages(str(ROOT), **settings)
    assert {name.split(".")[0] for name in found} == {"scconv_deploy"}
    folders = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("*.py")}
    assert set(found) == folders  # no folder without its __init__.py


def test_what_is_declared_has_a_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(r.name): r for line in lines if line[:1] not in ("", "#") for r in [Requirement(line)]}
    for requirement in map(Requirement, project["dependencies"]):
        (pinned,) = pins[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(pinned.version), requirement
