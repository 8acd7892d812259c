"""The package as a whole: what it exports, what it imports, and where it lives."""

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import scconv_deploy

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "scconv_deploy"
MODULES = sorted(PACKAGE.rglob("*.py"))


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


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [*project["optional-dependencies"]["data"], *project["optional-dependencies"]["rtx"]]
    declared = {canonicalize_name(Requirement(text).name) for text in (*project["dependencies"], *extras)}
    distributions = importlib.metadata.packages_distributions()
    imported = {name.split(".")[0] for path in MODULES for name in imports_of(path)}
    imported -= {*sys.stdlib_module_names, "scconv_deploy", "tensorrt"}  # one of two libraries, chosen at run time
    assert {"torch", "ml_dtypes", "google"} <= imported
    undeclared = {name for name in imported if not declared & set(map(canonicalize_name, distributions[name]))}
    assert not undeclared


def test_what_is_declared_has_a_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(r.name): r for line in lines if line[:1] not in ("", "#") for r in [Requirement(line)]}
    for requirement in map(Requirement, project["dependencies"]):
        (pinned,) = pins[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(pinned.version), requirement


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    imported = set(imports_of(path))
    where = path.relative_to(PACKAGE).as_posix()
    allowed = ("exporters", "rewrite", "verification", "inspection", "pipeline", "rewriting", "converting", "precision")
    allowed += ("building", "benchmarking", "bench_options", "exporting", "bundle/run.py")
    allowed_onnx = where.startswith(allowed)
    assert allowed_onnx or not any(name.split(".")[0] in ("onnx", "onnx_ir", "onnxruntime") for name in imported)
    if where.startswith("bundle"):
        outside = {n.split(".")[0] for n in imported} - set(sys.stdlib_module_names) - {"__future__", "scconv_deploy"}
        runtimes = {"onnxruntime", "tensorrt"} if where == "bundle/run.py" else set()  # a program of its own
        assert outside <= {"numpy"} | runtimes  # it also runs on the device
    if where.startswith(("gate", "nn", "zoo", "spec", "errors")):
        above = ("pipeline", "cli", "commands", "exporters", "rewrite", "verification", "report", "inspection")
        assert not any(name.startswith(tuple(f"scconv_deploy.{a}" for a in above)) for name in imported)
    assert "click" not in imported
