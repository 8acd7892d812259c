"""The command line's contract: exit codes, one line an error, one JSON document, nothing half-written, nothing lost."""

from __future__ import annotations

import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from typer.testing import CliRunner

from scconv_deploy import cli
from scconv_deploy.graph.file import serialize
from scconv_deploy.version import __version__
from scconv_deploy.workflows import deploy as pipeline
from scconv_deploy.workflows import export as exporting

REPORTS = ["report.html", "report.json"]
NET = """
    import os, sys, time
    import torch
    from torch import nn
    from scconv_deploy.nn import SRU

    class Net(nn.Module):
        def __init__(self, channels=8):
            super().__init__()
            self.conv = nn.Conv2d(3, channels, 3, padding=1)
            self.sru = SRU(channels, 4)
            self.head = nn.Linear(channels, 5)

        def forward(self, x):
            return self.head(self.sru(self.conv(x)).mean((2, 3)))

    def make(channels=8):
        return Net(channels)

    def raises():
        raise ValueError("first\\nsecond")

    def interrupted():
        raise KeyboardInterrupt

    def no_module():
        return 3

    def leaves():
        sys.exit(0)

    def noisy():
        print("from the factory")
        os.system("echo from a child")
        os.write(1, b"from the descriptor\\n")
        return Noisy()

    class Noisy(Net):
        def forward(self, x):
            print("from the forward")
            return super().forward(x)

    class Unpacks(Net):
        def forward(self, x):
            n, c, h, w = x.shape
            return super().forward(x)

    class LeavesLate(Net):
        def forward(self, x):
            sys.exit(0)

    class Waits(Net):
        def forward(self, x):
            if torch.compiler.is_exporting():
                open("exporting", "w").close()
                time.sleep(60)
            return super().forward(x)

    class Pair(Net):
        def forward(self, x, scale=None, *, bias):
            return {"logits": super().forward(x) + bias, "features": (x, bias)}
"""
SHAPE = ("--input", "1x3x8x8")


def write_net(folder="."):
    (Path(folder) / "net.py").write_text(textwrap.dedent(NET))


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """An own folder with net.py; what loading leaves on sys.path and in sys.modules goes with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "net", raising=False)  # another test's
    before = set(sys.modules)
    write_net()
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def run(monkeypatch):
    def runner(*args):
        monkeypatch.setattr(sys, "argv", ["scconv-deploy", *map(str, args)])
        return CliRunner().invoke(cli.app, [str(arg) for arg in args])

    return runner


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """net.py:make as an onnx_ir.Model, exported once."""
    folder = tmp_path_factory.mktemp("exported")
    write_net(folder)
    kept = {}
    real = exporting.export_to_ir

    def keep(*args, **kwargs):
        kept["model"] = real(*args, **kwargs)
        return kept["model"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(exporting, "export_to_ir", keep)
        result = CliRunner().invoke(cli.app, ["export", f"{folder}/net.py:make", "-o", f"{folder}/net.onnx", *SHAPE])
    sys.modules.pop("net", None)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == f"{folder}/net.onnx: 1 SRUs as nodes"
    assert serialize(kept["model"]) == (folder / "net.onnx").read_bytes()
    return kept["model"]


@pytest.fixture
def quick_export(monkeypatch, exported):
    """The export proper is replaced by its result; everything around it runs."""
    for module in (exporting, pipeline):
        monkeypatch.setattr(module, "export_to_ir", lambda *args, **kwargs: exported)


@pytest.fixture
def artifact(exported):
    Path("net.onnx").write_bytes(serialize(exported))
    return Path("net.onnx")


def tampered(model):
    """The bytes of a model one of whose cuts is wrong."""
    proto = onnx.load_model_from_string(serialize(model))
    (node,) = (n for n in proto.graph.node if n.domain == "scconv")
    (cut,) = (t for t in proto.graph.initializer if t.name == node.input[1])
    cut.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(cut) + np.float32(0.5), cut.name))
    return proto.SerializeToString()


def content():
    return {str(p): p.read_bytes() for p in Path().rglob("*") if p.is_file() and "__pycache__" not in p.parts}


class Fails:
    """Run a command that must fail: its code, its line, and that it wrote nothing."""

    code: ClassVar[dict[str, int]] = {"internal": 1, "usage": 2, "environment": 3, "model": 4, "parity": 6, "file": 7}

    def __init__(self, run):
        self.run = run

    def __call__(self, kind, *args, words=(), noise=False):
        before = content()
        result = self.run(*args)
        assert result.exit_code == self.code[kind], result.output
        assert not [line for line in result.stderr.splitlines() if "Traceback" in line]
        lines = result.stderr.splitlines()
        assert noise or len(lines) == 1, result.stderr
        assert lines[-1].startswith("scconv-deploy: ")
        for word in [words] if isinstance(words, str) else words:
            assert word in lines[-1]
        assert result.stdout == ""
        assert content() == before
        return lines[-1]


@pytest.fixture
def fails(run):
    return Fails(run)


# --- MODEL ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "model", "words"),
    [
        ("usage", "scconv_resnet2", "Did you mean scconv_resnet20?"),
        ("usage", "missing.py:make", "missing.py does not exist"),
        ("usage", "net.py:mak", "net.py has no 'mak'. Did you mean make?"),
        ("usage", "net.py", "Write net.py:NAME"),
        ("usage", "nowhere:make", "No module 'nowhere'"),
        ("usage", "missing.pt", "missing.pt does not exist"),
        ("usage", "net.py:no_module", "gives int, expected a torch.nn.Module"),
        ("model", "net.py:raises", "net.py:raises raised ValueError: first. Check --kwargs and the factory."),
        ("model", "net.py:leaves", "called sys.exit(0)"),
        ("model", "net.py:LeavesLate", "The model called sys.exit(0)"),
    ],
)
@pytest.mark.parametrize("command", ["export", "deploy"])
def test_models_that_cannot_be_loaded(fails, command, kind, model, words):
    fails(kind, command, model, "-o", "out", *SHAPE, words=words)


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("usage", "import torch\nx = torch.ones(1, requires_grad=True)\nx.backward()", "line 3 calls .backward()"),
        ("model", "import sys; sys.exit(3)", "called sys.exit(3)"),
        ("model", "def make(:", "is not Python"),
        ("model", "import not_installed_here", "needs the module 'not_installed_here'"),
        ("model", "raise RuntimeError('no GPU\\nhere')", "raised RuntimeError: no GPU"),
    ],
)
def test_files_that_cannot_be_imported(fails, kind, code, words):
    Path("user.py").write_text(code)
    fails(kind, "export", "user.py:make", "-o", "out.onnx", *SHAPE, words=("user.py", words))


def test_a_file_with_a_command_line_of_its_own(fails, run):
    parser = "import argparse\np = argparse.ArgumentParser()\n"
    Path("user.py").write_text(
        textwrap.dedent(NET) + parser + "p.add_argument('--epochs', default=3)\np.parse_args()\n"
    )
    assert run("inspect", "user.py:make", *SHAPE, "--quiet").exit_code == 0
    Path("user.py").write_text(parser + "p.add_argument('--data', required=True)\np.parse_args()\n")
    fails("model", "inspect", "user.py:make", *SHAPE, words="called sys.exit(2)", noise=True)


@pytest.mark.parametrize(
    ("kind", "kwargs", "words"),
    [
        ("usage", "{channels: 8}", "is not JSON"),
        ("usage", "[8]", "is a JSON list, expected an object"),
        ("usage", '{"channel": 8}', "unexpected keyword argument 'channel'. It takes channels=8"),
        ("model", '{"channels": 9}', "9 channels"),
    ],
)
def test_kwargs_that_do_not_fit(fails, kind, kwargs, words):
    fails(kind, "export", "net.py:make", "-o", "out.onnx", *SHAPE, "--kwargs", kwargs, words=words)


# --- weights ----------------------------------------------------------------------------------------------------


class Evil:
    """Unpickling it would create a file."""

    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def weights_file(name):
    state = {"conv.weight": torch.ones(8, 3, 3, 3), "fc.weight": torch.ones(3)}
    path = Path(name)
    if "evil" in name:
        path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    elif "empty" in name:
        path.touch()
    elif name.endswith(".safetensors"):
        from safetensors.torch import save

        path.write_bytes(save(state)[:50])
    elif "missing" not in name:
        torch.save(state, path)
        if "truncated" in name:
            path.write_bytes(path.read_bytes()[:-100])
    return path


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("usage", "missing.pt", "Weights file missing.pt does not exist"),
        ("file", "empty.pt", "Weights file empty.pt is empty"),
        ("file", "truncated.safetensors", "truncated.safetensors is damaged"),
        ("file", "truncated.pt", "truncated.pt is damaged"),
        ("file", "evil.pt", "would execute code"),
        ("model", "other.pt", "5 missing (conv.bias, sru.gn.gamma, sru.gn.beta, head.weight, head.bias); 1 unexpected"),
    ],
)
def test_weights_that_do_not_load(fails, kind, name, words):
    path = weights_file(name)
    fails(kind, "export", "net.py:make", "-o", "out.onnx", *SHAPE, "--weights", path, words=(name, words))
    assert not Path("executed").exists()


def test_non_strict(run):
    path = weights_file("other.pt")
    assert run("inspect", "net.py:make", *SHAPE, "--weights", path, "--non-strict").exit_code == 0


def test_options_of_a_model_mean_nothing_to_an_artifact(run, fails):
    assert run("export", "net.py:make", "-o", "net.onnx", *SHAPE).exit_code == 0
    fails("usage", "inspect", "net.onnx", *SHAPE, words=("net.onnx is an artifact", "Leave them out"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_said(artifact):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "scconv_deploy", "inspect", str(artifact), "--json"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "No space is left" in done.stderr
    assert "bug" not in done.stderr


def test_a_pickled_module_as_model(run, fails):
    assert run("inspect", "net:make", *SHAPE).exit_code == 0  # imports net, so that it can be pickled
    torch.save(sys.modules["net"].make(), "best.pt")
    fails("file", "inspect", "best.pt", *SHAPE, words=("best.pt", "--trust-checkpoint"))
    result = run("inspect", "best.pt", *SHAPE, "--trust-checkpoint", "--json")
    assert json.loads(result.stdout)["srus"][0]["variant"].startswith("groupbn-hard")


def test_weights_as_model(fails):
    weights_file("w.pt")
    fails("usage", "inspect", "w.pt", *SHAPE, words=("holds weights, not a module", "--weights w.pt"))


# --- inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("usage", ["--input", "1,3,8,8"], "Write for example 1x3x224x224"),
        ("usage", ["--input", "1x3x8x8:float33"], "no dtype 'float33'"),
        ("model", ["--input", "1x3x8x8:int64"], "refuses its inputs"),
        ("usage", ["--input", "y:1x3x8x8"], "forward has no parameter 'y'. It takes x."),
        ("usage", [*SHAPE, *SHAPE], "no parameter left for it. It takes x."),
        ("usage", ["--input", "99999x3x99999x99999"], "larger than the memory"),
        ("usage", [*SHAPE, "--batch", "4"], "--batch '4' is not MIN:OPT:MAX. Write for example 1:4:8."),
        ("usage", [*SHAPE, "--batch", ""], "(--batch) is empty, expected a value"),
        ("usage", [*SHAPE, "--batch", "4:2:8"], "expected 1 <= MIN <= OPT <= MAX"),
        ("usage", [*SHAPE, "--dynamic", "x=1:2:3"], "Write for example x:2=64:224:512"),
        ("usage", [*SHAPE, "--dynamic", "y:2=8:8:16"], "no input is called 'y'. The inputs are x."),
        ("usage", [*SHAPE, "--dynamic", "x:4=8:8:16"], "axis 4 of input x: its shape [1, 3, 8, 8] has 4 axes"),
        ("usage", [*SHAPE, "--batch", "1:2:4", "--dynamic", "x:0=1:2:4"], "axis 0 of input x is given twice"),
        ("usage", [*SHAPE, "--seed", "-1"], "--seed"),
        ("usage", [*SHAPE, "--opset", "5"], "Opset 5"),
    ],
)
def test_inputs_that_do_not_fit(fails, kind, options, words):
    fails(kind, "export", "net.py:make", "-o", "out.onnx", *options, words=words)


def corrected(line):
    """The command in a message, ready for the runner."""
    command = shlex.split(line[line.rindex(": scconv-deploy ") + 2 :])
    assert command[0] == "scconv-deploy"
    return command[1:]


def test_the_corrected_command_can_be_pasted(run, fails):
    Path("my net.py").write_text(textwrap.dedent(NET))
    line = fails("usage", "inspect", "my net.py:make", "--seed", "3", words="its inputs are not known")
    assert corrected(line) == ["inspect", "my net.py:make", "--seed", "3", "--input", "1x3x224x224"]
    for wrong in (["--input", "x:1x4x8x8"], ["--input=1x4x8x8"]):
        line = fails("model", "inspect", *wrong, "my net.py:make", "--batch", "1:2:4", words="3 channels")
        assert corrected(line) == ["inspect", "my net.py:make", "--batch", "1:2:4", "--input", "2x3x8x8"]
        assert run(*corrected(line)).exit_code == 0


def test_a_shape_that_the_models_own_code_refuses(fails):
    fails("model", "inspect", "net.py:Unpacks", "--input", "3x8x8", words="ValueError: not enough values to unpack")


def test_several_inputs(run, fails):
    words = ("forward also needs bias", "--input bias:1x16")
    fails("usage", "inspect", "net.py:Pair", *SHAPE, words=words)
    result = run("inspect", "net.py:Pair", *SHAPE, "--input", "bias:1x5", "--json")
    assert json.loads(result.stdout)["inputs"] == ["1x3x8x8", "bias:1x5"]


# --- the command line itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["exprt"], "Did you mean 'export', 'report'? See scconv-deploy --help."),
        (["export"], "Missing argument"),
        (["export", "net.py:make"], "Missing option '--output' / '-o'"),
        (["export", "net.py:make", "-o"], "requires an argument"),
        (["export", "net.py:make", "-o", "out.onnx", "more"], "unexpected extra argument"),
        (["export", "net.py:make", "-o", "out.onnx", "--wieghts", "w.pt"], "--weights"),
        (["export", "net.py:make", "-o", "out.onnx", "--opset", "x"], "See scconv-deploy export --help."),
        (["export", "net.py:make", "-o", "out.onnx", "--mask-form", "and"], "multiply"),
    ],
)
def test_command_lines_that_cannot_be_parsed(fails, run, args, words):
    fails("usage", *args, words=words)
    if args[-1] != "-o":
        error = json.loads(run(*args, "--json").stdout)["error"]
        assert error["exit_code"] == 2
        assert words in f"{error['message']} {error['remedy']}"


def test_help_and_version(run):
    assert "deploy" in run().stdout
    assert run().exit_code == 0
    assert run("export", "--help").exit_code == 0
    assert run("--version").stdout == f"{__version__}\n"


# --- outputs ----------------------------------------------------------------------------------------------------


def test_an_output_that_exists(fails):
    Path("out.onnx").write_text("old")
    fails("usage", "export", "net.py:make", "-o", "out.onnx", *SHAPE, words=("out.onnx exists", "--force"))
    fails("usage", "deploy", "net.py:make", "-o", "out.onnx", *SHAPE, "--force", words="is a file, expected a folder")
    Path("out.json").write_text("kept")
    fails("usage", "verify", "net.py", "--reference", "x", "--report", "out.json", words=("out.json exists", "--force"))
    fails("usage", "verify", "net.py", "--reference", "x", "--report", "out.onnx", words=".onnx is no report format")
    Path("folder").mkdir()
    Path("folder/thesis.tex").write_text("mine")
    fails("usage", "export", "net.py:make", "-o", "folder", *SHAPE, "--force", words="is a folder, expected a file")
    for force in ([], ["--force"]):
        fails("usage", "deploy", "net.py:make", "-o", "folder", *SHAPE, *force, words="is not a bundle")
    fails("usage", "deploy", "net.py:make", "-o", ".", *SHAPE, "--force", words="is the current folder")


@pytest.mark.parametrize("command", ["export", "deploy"])
def test_below_a_regular_file(fails, command):
    fails("usage", command, "net.py:make", "-o", "net.py/out", *SHAPE, words="net.py is not a folder")


def test_force(run, quick_export, exported):
    Path("out.onnx").write_text("old")
    result = run("export", "net.py:make", "-o", "out.onnx", *SHAPE, "--force", "--json")
    assert Path("out.onnx").read_bytes() == serialize(exported)
    assert json.loads(result.stdout)["sites"] == {"sru": "groupbn-hard"}


@pytest.mark.parametrize("function", ["os.replace", "tempfile.mkstemp"])
def test_a_disk_that_cannot_be_written(monkeypatch, fails, quick_export, function):
    Path("out.onnx").write_text("old")

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(function, read_only)
    words = "out.onnx cannot be written: Read-only file system"
    fails("usage", "export", "net.py:make", "-o", "out.onnx", *SHAPE, "--force", words=words)
    fails("usage", "deploy", "net.py:make", "-o", "new", *SHAPE, words="cannot be written: Read-only file system")


@pytest.mark.parametrize("model", ["net.py:raises", "net.py:interrupted", "net.py:LeavesLate"])
def test_what_exists_survives_a_failed_run(run, model):
    Path("out.onnx").write_text("old")
    before = content()
    assert run("export", model, "-o", "out.onnx", *SHAPE, "--force").exit_code in (4, 130)
    assert content() == before


# --- what is printed --------------------------------------------------------------------------------------------


def test_one_json_document_whatever_the_users_code_prints(run):
    result = run("inspect", "net.py:noisy", *SHAPE, "--json")
    assert json.loads(result.stdout)["srus"][0]["site"] == "sru"
    assert "from the factory" in result.stderr
    assert "from the forward" in result.stderr


def test_the_tables_alone_are_on_stdout(run):
    result = run("inspect", "net.py:noisy", *SHAPE)
    assert result.stdout.startswith("net.py:noisy: ")
    assert "from the" not in result.stdout


@pytest.mark.parametrize("model", ["net.py:raises", "net.py:interrupted", "scconv_resnet2", "net.py:LeavesLate"])
def test_one_json_document_on_errors(run, model):
    result = run("export", model, "-o", "out.onnx", *SHAPE, "--json")
    error = json.loads(result.stdout)["error"]
    assert error["exit_code"] == result.exit_code
    assert result.stderr == f"scconv-deploy: {error['message']} {error['remedy']}\n"


def test_quiet(run, artifact):
    for args in (["inspect", "net.py:noisy", *SHAPE], ["inspect", artifact]):
        result = run(*args, "--quiet")
        assert (result.exit_code, result.stdout) == (0, "")


def test_an_internal_error_is_a_bug_and_says_so(run, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("in our code")

    monkeypatch.setattr(exporting, "reference_from_spec", broken)
    before = content()
    for options in ([], ["--json"], ["--quiet"]):
        result = run("export", "net.py:make", "-o", "out.onnx", *SHAPE, *options)
        assert result.exit_code == 1
        line = result.stderr.splitlines()[-1]
        assert line.startswith("scconv-deploy: Internal error: ZeroDivisionError: in our code. This is a bug in scconv")
        assert "Traceback" in result.stderr
        assert content() == before
        if options == ["--json"]:
            assert json.loads(result.stdout)["error"]["exit_code"] == 1


def test_a_file_that_may_not_be_read(fails, monkeypatch):
    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "read_bytes", denied)
    result = fails.run("inspect", "net.py:make", *SHAPE)
    assert result.exit_code == 2
    assert result.stderr == "scconv-deploy: net.py cannot be read: Permission denied. Check its permissions.\n"


# --- artifacts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["verify", "--reference", "net.py:make", *SHAPE], ["inspect"]])
@pytest.mark.parametrize(
    ("kind", "data", "words"),
    [
        ("usage", None, "net.onnx does not exist"),
        ("file", b"", "net.onnx is empty"),
        ("file", b"a text file", "net.onnx is truncated or not ONNX"),
        ("file", b"PK\x03\x04" + bytes(range(256)), "net.onnx is truncated or not ONNX"),
    ],
)
def test_artifacts_that_are_none(fails, command, kind, data, words):
    if data is not None:
        Path("net.onnx").write_bytes(data)
    fails(kind, *command, "net.onnx", words=words)


def test_bundles_that_are_none(fails):
    Path("bundle").mkdir()
    fails("usage", "inspect", "bundle", words="bundle is not a bundle: it has no manifest.json")
    Path("bundle/manifest.json").write_text("{")
    fails("file", "inspect", "bundle", words="manifest.json is damaged")
    Path("bundle/manifest.json").write_text('{"files": {}}')
    fails("usage", "inspect", "bundle", words="bundle holds no model.onnx, which every bundle has. Copy the bundle")


def test_verify_a_good_and_a_tampered_file(run, artifact, exported):
    args = ["verify", artifact, "--reference", "net.py:make", *SHAPE, "--json"]
    good = run(*args, "--report", "report.json")
    assert good.exit_code == 0
    assert json.loads(good.stdout)["verdict"] == "passed"
    assert json.loads(Path("report.json").read_text()) == json.loads(good.stdout)
    artifact.write_bytes(tampered(exported))
    bad = run(*args)
    assert bad.exit_code == 6
    assert json.loads(bad.stdout)["verdict"] == "failed"  # the report, and no second document
    assert run(*args, "--report", "report.xml").exit_code == 6
    document = json.loads(bad.stdout)
    failed = len(document["failures"]) + sum(sru["static"]["status"] == "failed" for sru in document["srus"])
    assert f'failures="{failed}"' in Path("report.xml").read_text().splitlines()[1]
    (line,) = bad.stderr.splitlines()
    assert "cut differs" in line
    assert line.endswith("Do not ship it.")


def test_verify_with_another_tolerance(run, fails, artifact):
    args = ["verify", artifact, "--reference", "net.py:make", *SHAPE]
    strict = run(*args, "--tolerance", "replay_multiple=1e-9", "--json")
    assert strict.exit_code == 6
    assert json.loads(strict.stdout)["overrides"] == {"replay_multiple": 1e-9}
    fails("usage", *args, "--tolerance", "replay=1", words=("No tolerance is called 'replay'", "replay_multiple"))
    fails("environment", *args, "--provider", "qnn", words=("ONNX Runtime has no qnn here", "CPUExecutionProvider"))
    fails("usage", *args, "--preprocessing", "{", words=("--preprocessing '{'", '"mean"'))


def test_verify_without_a_model(run, fails, artifact, exported):
    fails("usage", "verify", artifact, words=("is not a bundle", "--reference MODEL"))
    for more in ([], ["--digest", "0" * 64]):
        fails("usage", "verify", "nosuchdir", *more, words="nosuchdir does not exist. Check the path.")
    for options in (SHAPE, ["--seed", "3"], ["--trust-checkpoint"]):
        fails("usage", "verify", artifact, *options, words="These options belong to a model")
    fails(
        "usage", "verify", artifact, "--reference", artifact, "--embed", "paper", words="the reference is an ONNX file"
    )
    Path("reference.onnx").write_bytes(artifact.read_bytes())
    args = ["verify", artifact, "--reference", "reference.onnx"]
    assert run(*args, "--quiet").exit_code == 0
    fails("usage", *args, *SHAPE, words="the reference is an ONNX file")
    artifact.write_bytes(tampered(exported))
    assert run(*args, "--quiet").exit_code == 6


def test_verify_on_another_shape(run, fails, artifact):
    words = ("index: 2 Got: 9 Expected: 8", "Give the inputs that it was exported for.")
    fails("model", "verify", artifact, "--reference", "net.py:make", "--input", "1x3x9x8", words=words)


def test_verify_on_a_size_that_pytorch_refuses(fails, artifact):
    Path("strict.py").write_text(
        "from net import make as other\n"
        "def make():\n"
        "    model = other()\n"
        "    def refuse(module, args):\n"
        "        if args[0].shape[0] > 1:\n"
        "            raise RuntimeError('one image at a time')\n"
        "    model.register_forward_pre_hook(refuse)\n"
        "    return model\n"
    )
    np.savez("two.npz", x=np.ones((2, 3, 8, 8), np.float32))
    args = ["verify", artifact, "--reference", "strict.py:make", "--input", "1x3x8x8", "--data", "two.npz"]
    fails("model", *args, "--batch", "1:1:2", words="The model refuses inputs of these sizes")


def test_verify_against_another_model(fails, artifact):
    args = ["verify", artifact, "--reference", "net.py:Pair", *SHAPE, "--input", "bias:1x5"]
    fails("usage", *args, words="The artifact's inputs are x; the reference's x, bias.")


def test_verify_on_data_that_does_not_fit(fails, artifact):
    np.savez("data.npz", image=np.ones((1, 3, 8, 8)))
    args = ["verify", artifact, "--reference", "net.py:make", *SHAPE, "--data"]
    fails("usage", *args, "data.npz", words=("holds image", "Save one array per input: x"))
    fails("usage", *args, "missing", words="--data missing does not exist")
    Path("data.npz").write_text("text")
    fails("file", *args, "data.npz", words="damaged or not an .npz")


def test_deploy_writes_a_bundle_and_force_replaces_it(run, fails, quick_export, exported, monkeypatch):
    args = ["deploy", "net.py:make", "-o", "bundle", *SHAPE]
    result = run(*args, "--json")
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    assert document["artifact"] == "bundle/model.onnx"
    files = ["manifest.json", "model.onnx", "reference", *REPORTS, "run.py"]
    assert sorted(p.name for p in Path("bundle").iterdir()) == files
    fails("usage", *args, words=("bundle exists", "--force"))
    assert json.loads(run("verify", "bundle", "--json").stdout)["verdict"] == "passed"  # by its own reference
    assert run("verify", "bundle", "--reference", "net.py:make", *SHAPE, "--quiet").exit_code == 0
    monkeypatch.setattr(pipeline, "serialize", tampered)
    rejected = run(*args, "--force")
    assert rejected.exit_code == 6
    assert "bundle/model.onnx.rejected: onnxruntime:" in rejected.stderr.splitlines()[-1]
    files = ["manifest.json", "model.onnx.rejected", "reference", *REPORTS, "run.py"]
    assert sorted(p.name for p in Path("bundle").iterdir()) == files
    assert not [name for name in content() if ".scconv-deploy" in name]


# --- processes --------------------------------------------------------------------------------------------------


def python(*args, **options):
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, *args], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_help_does_not_import_torch():
    code = (
        "import sys\nfrom scconv_deploy.cli import main\nsys.argv[1:] = ['deploy', '--help']\ntry: main()\n"
        "finally: print(sorted({'torch', 'onnx', 'numpy', 'onnxruntime'} & set(sys.modules)), file=sys.stderr)"
    )
    process = python("-c", code)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--weights" in out
    assert err == "[]\n"


def test_as_a_module():
    process = python("-m", "scconv_deploy", "--version")
    assert process.communicate(timeout=60) == (f"{__version__}\n", "")
    assert process.returncode == 0


def test_child_processes_do_not_write_to_stdout_either():
    process = python("-m", "scconv_deploy", "inspect", "net.py:noisy", *SHAPE, "--json")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0
    assert json.loads(out)["kind"] == "model"
    for line in ("from the factory", "from a child", "from the descriptor", "from the forward"):
        assert line in err.splitlines()


def test_an_interrupt_in_the_middle_of_an_export():
    """SIGINT, and other places: tests/system/test_signals.py."""
    number = signal.SIGTERM
    Path("out.onnx").write_text("old")
    process = python("-m", "scconv_deploy", "export", "net.py:Waits", "-o", "out.onnx", *SHAPE, "--force", "--json")
    deadline = time.monotonic() + 100
    while not Path("exporting").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err == "scconv-deploy: Interrupted by SIGTERM. No half-written file is left.\n"
    assert json.loads(out)["error"]["exit_code"] == 128 + number
    assert sorted(content()) == ["exporting", "net.py", "out.onnx"]
    assert Path("out.onnx").read_text() == "old"


# --- doctor -----------------------------------------------------------------------------------------------------


def test_doctor(run, fails, monkeypatch):
    from scconv_deploy.workflows import doctor

    findings = (
        doctor.Finding("python", "python", "ok", "3.11"),
        doctor.Finding("compiler", "nvcc", "missing", "not found", "building the fused SRU", "pip install nvcc"),
    )
    monkeypatch.setattr(doctor, "diagnose", lambda: doctor.Diagnosis(findings))
    result = run("doctor")
    assert result.exit_code == 0
    assert "nvcc (for building the fused SRU): pip install nvcc" in result.stdout
    document = json.loads(run("doctor", "--json").stdout)
    assert (document["complete"], document["findings"][1]["status"]) == (True, "missing")
    result = run("doctor", "--require", "nvcc", "--quiet")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "nvcc: not found. pip install nvcc" in result.stderr
