"""Run files: every key is an option of deploy, and every mistake is one line with its number."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from scconv_deploy.commands.models import deploy
from scconv_deploy.commands.run_file import deploy_keys, read_run_file
from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.records.run import SEVERITY

FILE = """\
# what is released
[run]
output = "release"

[defaults]
batch = "1:2:8"
tolerance = [
    "replay_multiple=9",
    "half_multiple=9",
]

[[models]]
name = "r20"
model = "scconv_resnet20"
kwargs = {num_classes = 5}
seed = 3

[[models]]
name = "own"
model = "train.py:make"
weights = "best.safetensors"
input = "1x3x8x8"

[[variants]]
name = "single"

[[variants]]
name = "half"
precision = "fp16"
backend = ["onnx", "tensorrt-rtx"]
target = "sm89"
non-strict = true
require-plugin = false
batch = "2:2:2"
"""


def written(tmp_path, text):
    path = tmp_path / "release.toml"
    path.write_text(text)
    return path


def refused(path, kind=UsageError):
    with pytest.raises(kind) as caught:
        read_run_file(path)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    return str(caught.value)


def test_cells_are_models_by_variants_with_the_command_lines_own_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("x = 1\n")
    found = read_run_file(written(tmp_path, FILE))
    assert (str(found.output), found.engine, found.address, found.jobs) == ("release", None, "", None)
    assert not found.bench
    assert [cell.name for cell in found.cells] == ["r20/single", "r20/half", "own/single", "own/half"]
    shared = ["--batch=1:2:8", "--tolerance=replay_multiple=9", "--tolerance=half_multiple=9"]
    of_r20 = ['--kwargs={"num_classes": 5}', "--seed=3"]
    assert list(found.cells[0].arguments) == ["scconv_resnet20", *shared, *of_r20]
    half = ["--precision=fp16", "--backend=onnx", "--backend=tensorrt-rtx", "--target=sm89", "--non-strict"]
    assert list(found.cells[1].arguments) == ["scconv_resnet20", "--batch=2:2:2", *shared[1:], *of_r20, *half]
    assert found.cells[2].named == ("train.py", "best.safetensors")
    command = get_command(made())
    for cell in found.cells:
        command.make_context("deploy", [*cell.arguments, "-o", "x"])


def made():
    app = typer.Typer()
    app.command()(deploy)
    return app


def test_the_keys_are_the_options_of_deploy():
    options = {o.opts[0].removeprefix("--") for o in get_command(made()).params if o.opts[0].startswith("--")}
    assert set(deploy_keys()) == options - {"output", "force", "json", "quiet", "install-completion", "show-completion"}
    assert len(deploy_keys()) > 30


WRONG = {"bool": ("3", '"yes"', "[true]"), "int": ('"3"', "true", "-1", "2.5"), "str": ("3", '""', "true")}


@pytest.mark.parametrize("table", ["defaults", "models", "variants"])
@pytest.mark.parametrize("name", list(deploy_keys()))
def test_every_key_wrong_once(tmp_path, name, table):
    key = deploy_keys()[name]
    kind = "str" if isinstance(key.kind, tuple) or key.kind.__name__ in ("str", "Path") else key.kind.__name__
    values = [*WRONG[kind], *(["[]", '["a", 3]'] if key.many else ['["a"]']), *(['"no choice"'] * (kind == "str"))]
    if not isinstance(key.kind, tuple):
        values.remove('"no choice"') if '"no choice"' in values else None
    if name in ("opset",):
        values.remove("-1")  # the export refuses it
    for value in values:
        lines = ["[run]", 'output = "o"', "[[models]]", 'name = "m"', 'model = "m"', "[[variants]]", 'name = "v"']
        place = {"defaults": 2, "models": 5, "variants": 7}[table]
        added = (["[defaults]"] if table == "defaults" else []) + [f"{name} = {value}"]
        number = place + len(added)
        path = written(tmp_path, "\n".join([*lines[:place], *added, *lines[place:]]))
        said = refused(path)
        assert said.startswith(f"{path}, line {number}: {name} is "), said
        assert f"expected {key.expected}. Correct it there." in said


BASE = '[run]\noutput = "o"\n[[models]]\nname = "m"\nmodel = "m"\n[[variants]]\nname = "v"\n'
CASES = [
    ("", 1, "There is no [run]. Add [run]"),
    ('[run]\n[[models]]\nname = "m"\n', 1, '[run] has no output, expected a folder, for example "release".'),
    (BASE.replace('output = "o"', "output = 3"), 2, "output is 3, expected a folder"),
    (BASE.replace('"o"', '"o"\nengine = "spark"'), 3, "engine is 'spark', expected one of local, ray."),
    (BASE.replace('"o"', '"o"\njobs = 0'), 3, "jobs is 0, expected an integer of at least 1."),
    (BASE.replace('"o"', '"o"\njobs = true'), 3, "jobs is true, expected an integer of at least 1."),
    (BASE.replace('"o"', '"o"\nbench = 1'), 3, "bench is 1, expected true or false."),
    (BASE.replace('"o"', '"o"\naddress = ""'), 3, "address is '', expected the address of a Ray cluster."),
    (BASE.replace('"o"', '"o"\nouput = "x"'), 3, "[run] has no key 'ouput'. Did you mean output?"),
    ("run = 3\n", 1, "run is 3, expected a table [run]."),
    (BASE.replace("[run]", "defaults = 1\n[run]"), 1, "defaults is 1, expected a table [defaults]."),
    (BASE + "[variant]\n", 8, "a run file has no key 'variant'. Did you mean variants?"),
    (
        BASE + "[[variants]]\nname = 'w'\nprecison = 'fp16'\n",
        10,
        "[[variants]] has no key 'precison'. Did you mean prec",
    ),
    (BASE + "[[variants]]\nname = 'w'\noutput = 'x'\n", 10, "[[variants]] has no key 'output'."),
    (BASE + "[defaults]\nname = 'w'\n", 9, "[defaults] has no key 'name'."),
    (BASE.replace('name = "m"\n', ""), 3, "[[models]] number 1 has no name, expected a text."),
    (BASE.replace('model = "m"\n', ""), 3, "[[models]] number 1 has no model, expected a text."),
    (BASE.replace('name = "v"\n', ""), 6, "[[variants]] number 1 has no name, expected a text."),
    (BASE.replace('model = "m"', "model = 3"), 5, "model is 3, expected a text."),
    (BASE.replace('"v"', "3"), 7, "name is 3, expected a text."),
    (BASE.replace('"v"', '"a/b"'), 7, "name is 'a/b', expected a folder's name: letters, digits"),
    (BASE.replace('"v"', '".."'), 7, "name is '..', expected a folder's name"),
    (BASE + "# again\n[[variants]]\nname = 'V'\n", 10, "name is 'V', which line 7 has already, expected another."),
    ('[run]\noutput = "o"\n', 2, "There is no [[models]], expected at least one [[models]]."),
    (BASE.partition("[[variants]]")[0], 5, "There is no [[variants]], expected at least one [[variants]]."),
    ('models = []\n[run]\noutput = "o"\n', 1, "models is [], expected at least one [[models]]."),
    ('[run]\noutput = "o"\n[models]\nname = "x"\n', 3, 'models is {"name": "x"}, expected at least one [[models]].'),
    (
        BASE + "[[variants]]\nname = 'w'\nkeep = [\n  'a',\n  # no text:\n  3,\n]\n",
        10,
        'keep is ["a", 3], expected text',
    ),
    (BASE + '[[variants]]\nname = """\nw\n"""\n', 9, "name is 'w\\n', expected a folder's name"),
]


@pytest.mark.parametrize(("text", "line", "words"), CASES)
def test_what_is_wrong_is_named_with_its_line(tmp_path, text, line, words):
    path = written(tmp_path, text)
    assert refused(path).startswith(f"{path}, line {line}: {words}")


def test_no_file_and_no_toml(tmp_path):
    assert refused(tmp_path / "none.toml") == f"{tmp_path / 'none.toml'} does not exist. Name a run file (TOML)."
    assert "is no file" in refused(tmp_path)
    path = written(tmp_path, '[run]\noutput = "o\n')
    assert refused(path, IntegrityError).startswith(f"{path} is not TOML: ")
    assert "line 2" in refused(path, IntegrityError)
    path.write_bytes(b"\xff\xfe")
    assert "is not TOML" in refused(path, IntegrityError)


def test_a_loaders_data_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("batches.py").write_text("")
    Path("photos").mkdir()
    for data, open_ended, named in (("batches.py:rows", True, ("batches.py",)), ("photos", False, ("photos",))):
        (cell,) = read_run_file(written(tmp_path, BASE + f"data = '{data}'\n")).cells
        assert (cell.open_ended, cell.named) == (open_ended, named)


DOCS = Path(__file__).parents[2] / "docs" / "run.md"


def test_the_page_names_every_key_and_what_it_takes():
    rows = re.findall(r"^\| `([\w-]+)` \| (.+) \|$", DOCS.read_text().partition("| key | value |")[2], re.M)
    assert [(name, text.replace("\\|", "|")) for name, text in rows] == [
        (key.name, key.expected) for key in deploy_keys().values()
    ]


def test_the_file_on_the_page_can_be_read(tmp_path):
    (text,) = re.findall(r"^```toml\n(.*?)^```$", DOCS.read_text(), re.S | re.M)
    found = read_run_file(written(tmp_path, text))
    assert [cell.name for cell in found.cells] == ["r20/single", "r20/half", "ours/single", "ours/half"]
    command = get_command(made())
    for cell in found.cells:
        command.make_context("deploy", [*cell.arguments, "-o", "x"])


def test_the_page_has_the_order_of_exit_codes():
    text = " ".join(DOCS.read_text().partition("best first: ")[2].split()).partition(". ")[0]
    assert [int(number) for number in re.findall(r"\b\d+\b", text)] == [c for c in SEVERITY if c not in (141, 143)]
