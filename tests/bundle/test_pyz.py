"""finish.pyz: identical bytes, nothing of others in it, Python 3.10."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scconv_deploy.bundle import pyz
from scconv_deploy.bundle.device import command_line
from scconv_deploy.bundle.device.command_line import _parser
from scconv_deploy.bundle.manifest import bundle_digest, check_bundle, read_manifest
from scconv_deploy.bundle.pyz import PACKAGE_FOLDER, imported_modules, module_files, pyz_bytes
from scconv_deploy.cli import app
from tests.finished import copied

ALLOWED = {"numpy", "tensorrt", "scconv_deploy"}
BLOCK = """
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in {allowed!r} and not top.startswith('tensorrt'):
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocker())
sys.path = [sys.argv[1]] + [p for p in sys.path if p]
"""


@pytest.fixture
def bundle(device_bundle, tmp_path):
    return copied(device_bundle, tmp_path)


def imported(path):
    tree = ast.parse(path.read_text())
    names = [a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names]
    return names + [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]


def test_identical_modules_give_identical_bytes_and_the_bundle_has_them(device_bundle):
    assert pyz_bytes() == pyz_bytes() == (device_bundle / "finish.pyz").read_bytes()
    with zipfile.ZipFile(device_bundle / "finish.pyz") as archive:
        names = archive.namelist()
        assert names[0] == "__main__.py"
        assert names[1:] == sorted(names[1:])
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert (
            archive.read("scconv_deploy/bundle/device/finish.py")
            == (PACKAGE_FOLDER / "bundle" / "device" / "finish.py").read_bytes()
        )


def test_its_modules_import_nothing_but_the_standard_library_numpy_and_tensorrt():
    files = module_files()
    assert PACKAGE_FOLDER / "verification" / "engine" / "verdict.py" in files
    assert PACKAGE_FOLDER / "cli.py" not in files
    for path in files:
        top = {name.partition(".")[0] for name in imported(path)} - set(sys.stdlib_module_names)
        typing_only = {"torch", "onnx"} if "TYPE_CHECKING" in path.read_text() else set()
        assert top - typing_only <= ALLOWED, path


def test_its_modules_and_run_py_are_python_3_10():
    for path in [*module_files(), PACKAGE_FOLDER / "bundle" / "run.py"]:
        ast.parse(path.read_text(), feature_version=(3, 10))
    ast.parse(pyz._MAIN, feature_version=(3, 4))  # which must be able to say that its Python is too old


def test_which_imports_count():
    source = (
        "from typing import TYPE_CHECKING\n"
        "import scconv_deploy.gate.margins\n"
        "from scconv_deploy.system import gpu, nothing\n"
        "if TYPE_CHECKING:\n    from scconv_deploy.model import spec\n"
        "else:\n    from scconv_deploy.records import gates\n"
        "def f():\n    from scconv_deploy.errors import UsageError\n"
    )
    assert imported_modules(source) == [
        "scconv_deploy.gate.margins", "scconv_deploy.system", "scconv_deploy.system.gpu", "scconv_deploy.records",
        "scconv_deploy.records.gates", "scconv_deploy.errors",
    ]  # fmt: skip


def test_its_options_are_those_of_the_command():
    import typer

    command = typer.main.get_command(app).commands["finish"]
    ours = {option for parameter in command.params for option in parameter.opts if option.startswith("--")}
    theirs = {option for action in _parser()._actions for option in action.option_strings if option.startswith("--")}
    assert theirs - ours == {"--version", "--help"}
    assert ours <= theirs


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--warmup", "-3"), "--warmup: '-3' is no whole number of at least 0."),
        (("--warmup=-1",), "--warmup: '-1' is no whole number of at least 0."),
        (("--warmup", "1.5"), "--warmup: '1.5' is no whole number of at least 0."),
        (("--rounds", "0"), "--rounds: '0' is no whole number of at least 1."),
        (("--rounds", "-100"), "--rounds: '-100' is no whole number of at least 1."),
        (("--rounds", "many"), "--rounds: 'many' is no whole number of at least 1."),
        (("--rounds", "nan"), "--rounds: 'nan' is no whole number of at least 1."),
        (("--rounds",), "--rounds: expected one argument."),
        (("a", "b"), "unrecognized arguments: b."),
    ],
)
def test_its_numbers_are_checked_as_those_of_the_command(capsys, arguments, found):
    assert command_line.run(list(arguments)) == 2
    said = capsys.readouterr()
    assert said.err.startswith("finish.pyz: ")
    assert said.err.endswith(f"{found} See finish.pyz --help.\n")
    assert (said.err.count("\n"), said.out) == (1, "")
    assert command_line.run([*arguments, "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["exit_code"] == 2


def test_the_smallest_numbers_are_taken():
    options = _parser().parse_args(["--rounds", "1", "--warmup", "0"])
    assert (options.rounds, options.warmup) == (1, 0)


def run(python, *arguments, code=None, cwd=None):
    command = [python, "-c", code, *arguments] if code else [python, *arguments]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, cwd=cwd, check=False
    )


def module_names():
    paths = (path.relative_to(PACKAGE_FOLDER.parent).with_suffix("") for path in module_files())
    return ",".join(path.as_posix().replace("/", ".") for path in paths)


def blocked(body):
    return BLOCK.format(allowed=ALLOWED) + body


def test_with_all_other_imports_blocked_every_module_loads(device_bundle):
    """The modules come from the archive: the package itself is out of reach."""
    body = "import importlib\nfor name in sys.argv[2].split(','):\n    print(importlib.import_module(name).__file__)\n"
    done = run(sys.executable, device_bundle / "finish.pyz", module_names(), code=blocked(body))
    assert done.returncode == 0, done.stderr
    assert all(line.startswith(str(device_bundle / "finish.pyz")) for line in done.stdout.split())


FINISH = """
import json
from pathlib import Path
from contextlib import contextmanager
from scconv_deploy.bundle.device import command_line, finish
from scconv_deploy.errors import BuildError
from scconv_deploy.runtimes.tensorrt.versions import load_module
from scconv_deploy.runtimes.timing import measure
from scconv_deploy.bundle.engine_verdict import judge_with_bundle
bundle = Path(sys.argv[2])

class Recorded:
    '''In place of a GPU: what the bundle recorded of PyTorch.'''
    def __init__(self, source):
        self.runs = [source.run(i) for i in source.samples]
        self.inputs, self.outputs = tuple(self.runs[0].inputs), tuple(self.runs[0].given)
    def run(self, tensors):
        return next(r.given for r in self.runs if all((r.inputs[n] == tensors[n]).all() for n in r.inputs
                                                      if r.inputs[n].shape == tensors[n].shape)
                    and all(r.inputs[n].shape == tensors[n].shape for n in r.inputs))

@contextmanager
def opened(engine, plugin):
    yield Recorded(finish.read_reference(bundle))

def no_gpu(*_):
    raise BuildError("there is no GPU", "Add one.")

def judge(bundle, engine, plugin, log, facts):
    return judge_with_bundle(bundle, engine, log, provenance=facts, opener=opened, build_sru=no_gpu)

def time(engine, plugin, inputs, options):
    return measure(lambda: 1e-3, inputs, options.rounds, options.warmup)

finish.Device = lambda: finish_device("tensorrt-rtx", load=load_module, judge=judge, time=time)
"""
FINISH = FINISH.replace("bundle = Path", "finish_device = finish.Device\nbundle = Path")


def finish_with_rtx(python, bundle):
    """The whole of it with TensorRT-RTX as the builder, all other imports blocked; the JSON document."""
    body = FINISH + "command_line.main([str(bundle), '--no-plugin', '--json', '--rounds', '3'])\n"
    done = run(python, bundle / "finish.pyz", bundle, code=blocked(body))
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    (link,) = document["report"]["links"]
    assert link["status"] == "passed"
    assert "relative L2 0.0e+00" in link["reason"]
    assert document["engine"]["backend"] == "tensorrt-rtx"
    assert (bundle / "device" / "model.tensorrt-rtx.engine").stat().st_size == document["engine"]["file_bytes"]
    assert document["digest"] == bundle_digest(bundle / "device")
    return document


@pytest.mark.tensorrt
def test_with_all_other_imports_blocked_it_builds_an_engine_and_judges_it(bundle):
    pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx")
    finish_with_rtx(sys.executable, bundle)


def has(python, module):
    return run(python, code=f"import {module}").returncode == 0


def python310():
    """One that has NumPy; SCCONV_PYTHON310 names one that is found nowhere else."""
    places = [os.environ.get("SCCONV_PYTHON310"), shutil.which("python3.10")]
    places += sorted(map(str, Path("~/.pyenv/versions").expanduser().glob("3.10*/bin/python3.10")))
    for place in filter(None, places):
        done = run(place, code="import sys, numpy; print(sys.version_info[:2] == (3, 10))")
        if done.stdout.strip() == "True":
            return place
    pytest.skip("no Python 3.10 with NumPy was found; name one with SCCONV_PYTHON310")


@pytest.fixture(scope="module")
def old_python():
    return python310()


def test_python_3_10_loads_every_module_and_checks_the_bundle(bundle, old_python):
    body = "import importlib\nfor name in sys.argv[2].split(','):\n    importlib.import_module(name)\n"
    done = run(old_python, bundle / "finish.pyz", module_names(), code=blocked(body))
    assert done.returncode == 0, done.stderr
    help_text = run(old_python, bundle / "finish.pyz", "--help")
    assert help_text.returncode == 0
    assert "--no-plugin" in help_text.stdout
    missing = run(old_python, "finish.pyz", cwd=bundle)
    assert (missing.returncode, missing.stdout) == (3, "")
    assert missing.stderr.startswith("finish.pyz: TensorRT is not installed.")
    (bundle / "model.onnx").write_bytes((bundle / "model.onnx").read_bytes()[:-1])
    refused = run(old_python, "finish.pyz", cwd=bundle)
    assert (refused.returncode, refused.stdout) == (7, "")
    assert refused.stderr == (
        "finish.pyz: .: model.onnx is not the file that was sealed. Copy it again; nothing was loaded.\n"
    )


@pytest.mark.tensorrt
def test_python_3_10_finishes_a_bundle_from_one_end_to_the_other(bundle, old_python):
    """The engine is really built there; what PyTorch recorded stands in for running it, as above."""
    if not has(old_python, "tensorrt_rtx"):
        pytest.skip("that Python 3.10 has no tensorrt-rtx")
    document = finish_with_rtx(old_python, bundle)
    assert document["engine"]["versions"]["python"].startswith("3.10.")
    check_bundle(bundle / "device")


def test_python_3_10_judges_what_was_built(bundle, old_python):
    """Everything after the builder; the engine is a file with a manifest, for nothing opens it here."""
    body = (
        FINISH
        + """
from scconv_deploy.runtimes.tensorrt.engine import EngineArtifact, EngineManifest, EngineTensor, write_engine
from scconv_deploy.records.stage import StageLog
import hashlib
plan = finish.read_device_plan(bundle)
data = b"engine"
tensors = (EngineTensor("x", "FLOAT", (-1, 3, 8, 8)),), (EngineTensor("output", "FLOAT", (-1, 8)),)
digest = hashlib.sha256(data).hexdigest()
manifest = EngineManifest(digest, len(data), "tensorrt", "10.3.0", "local", (), "Orin", (), {}, *tensors,
                          plan.profiles, (), (), "", "", "c")
engine = write_engine(Path(sys.argv[3]) / "m.engine", data, manifest)
report = judge(bundle, engine, None, StageLog(), {})
print(report.verdict, report.links[0].reason)
"""
    )
    done = run(old_python, bundle / "finish.pyz", bundle, bundle.parent, code=blocked(body))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("passed ")
    assert "relative L2 0.0e+00" in done.stdout


def one_line(done, code):
    """The line on stderr, which is all that there is."""
    assert done.returncode == code
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


def test_without_numpy_one_line_says_how_to_get_it(bundle):
    bare = [sys.executable, "-I", "-S", bundle / "finish.pyz"]  # no site-packages
    done = run(*bare)
    assert one_line(done, 3) == (
        f"finish.pyz: NumPy is not installed for {sys.executable}. "
        f"sudo apt install python3-numpy, or {sys.executable} -m pip install numpy."
    )
    assert done.stdout == ""
    done = run(*bare, "--json")
    error = json.loads(done.stdout)["error"]
    assert one_line(done, 3) == f"finish.pyz: {error['message']} {error['remedy']}"
    assert error["exit_code"] == 3


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not here")
def test_one_that_was_cut_short_is_found_by_the_line_in_the_documentation(bundle):
    page = (PACKAGE_FOLDER.parent / "docs" / "device.md").read_text()
    (line,) = (line for line in page.splitlines() if line.startswith("sha256sum "))
    sealed = read_manifest(bundle)["files"]["finish.pyz"]["sha256"]

    def hashes():
        done = subprocess.run(line, shell=True, cwd=bundle, capture_output=True, text=True, check=True)
        manifest, own, *said = done.stdout.splitlines()
        assert manifest.split()[0] == bundle_digest(bundle)
        assert sealed in "".join(said)
        return own.split()[0]

    assert hashes() == sealed
    whole = (bundle / "finish.pyz").read_bytes()
    (bundle / "finish.pyz").write_bytes(whole[: len(whole) // 2])
    assert hashes() != sealed
    done = run(sys.executable, bundle / "finish.pyz")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("SyntaxError: ")


def test_a_numpy_that_does_not_load_is_told_by_its_cause(bundle, tmp_path):
    (tmp_path / "numpy.py").write_text(
        "raise ImportError('\\nREAD THIS\\n\\nOriginal error was: No module named numpy.core\\n')"
    )
    code = "import runpy, sys\nsys.path.insert(0, sys.argv[1])\nrunpy.run_path(sys.argv[2], run_name='__main__')\n"
    done = run(sys.executable, tmp_path, bundle / "finish.pyz", code=code)
    assert one_line(done, 3).startswith(
        "finish.pyz: NumPy does not load: Original error was: No module named numpy.core. sudo apt"
    )


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_an_older_python_is_told_so(monkeypatch, capsys, options):
    monkeypatch.setattr(sys, "version_info", (3, 8, 10))
    monkeypatch.setattr(sys, "argv", ["finish.pyz", *options])
    with pytest.raises(SystemExit) as left:
        exec(compile(pyz._MAIN, "__main__.py", "exec"), {})  # noqa: S102
    assert left.value.code == 3
    said = capsys.readouterr()
    assert said.err.startswith("finish.pyz: Python 3.10 or later is needed, found ")
    assert said.err.count("\n") == 1
    assert (json.loads(said.out)["error"]["exit_code"] == 3) if options else (said.out == "")
