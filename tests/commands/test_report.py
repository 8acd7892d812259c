"""``scconv-deploy report``: exit codes, formats, one document on stdout."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from scconv_deploy.cli import app
from scconv_deploy.report.render import to_json
from scconv_deploy.report.schema import schema_text
from tests.report.made import full_report
from tests.report.test_load import bundle


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with reports that passed and failed, and a bundle."""
    monkeypatch.chdir(tmp_path)
    Path("good.json").write_text(to_json(full_report()))
    Path("bad.json").write_text(to_json(full_report(ratio=9.0)))
    bundle(Path("bundle"), full_report())
    return tmp_path


def run(*args):
    return CliRunner().invoke(app, ["report", *args])


def test_show_prints_every_format(here):
    assert "parity   passed" in run("show", "good.json").stdout
    assert "parity   passed" in run("show", "bundle", "--format", "text").stdout
    assert run("show", "good.json", "--format", "markdown").stdout.startswith("### Parity passed")
    assert run("show", "good.json", "--format", "json").stdout == Path("good.json").read_text()
    assert ElementTree.fromstring(run("show", "good.json", "--format", "junit").stdout).tag == "testsuites"
    shown = run("show", "bad.json")
    assert shown.exit_code == 0  # showing is not judging
    assert shown.stdout.startswith("parity   failed: onnxruntime: logits: replay error 9.0e-07")


def test_show_writes_a_file_by_its_suffix_and_does_not_overwrite(here):
    for name, start in (("a.md", "### Parity"), ("a.xml", "<?xml"), ("a.json", "{"), ("a.txt", "left alone")):
        result = run("show", "good.json", "-o", name)
        assert (result.exit_code, result.stdout) == (0, "")
        assert Path(name).read_text().startswith(start)
    assert run("show", "good.json", "-o", "a.md").exit_code == 2
    assert run("show", "bad.json", "-o", "a.md", "--force").exit_code == 0
    assert Path("a.md").read_text().startswith("### Parity failed")
    unknown = run("show", "good.json", "-o", "a.pdf")
    assert unknown.exit_code == 2
    assert ".pdf is no report format" in unknown.stderr
    assert run("show", "good.json", "-o", "a.pdf", "--format", "markdown").exit_code == 0


def test_show_html(here):
    pytest.importorskip("matplotlib")
    assert run("show", "bundle", "-o", "a.html").exit_code == 0
    assert Path("a.html").read_text().startswith("<!DOCTYPE html>")
    assert run("show", "bundle", "--format", "html").stdout == Path("a.html").read_text()


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["good.json"], 0, ""),
        (["bundle", "--require", "onnxruntime"], 0, ""),
        (["bad.json"], 6, "9.0x the noise floor"),
        (["bad.json", "--tolerance", "replay_multiple=9.5"], 0, ""),
        (["good.json", "--tolerance", "replay_multiple=1"], 6, "replay_multiple 2 against 1 instead of 8"),
        (
            ["good.json", "--require", "onnxruntime,tensorrt"],
            6,
            "tensorrt is required and not run: no engine was built",
        ),
        (["good.json", "--require", "onnxruntime", "--require", "engine"], 6, "engine is required and not run"),
        (["good.json", "--require", "onnx"], 2, "Known: PyTorch with SRUs swapped, onnxruntime, engine"),
        (["good.json", "--tolerance", "speed=1"], 2, "There is no tolerance speed"),
        (["good.json", "--tolerance", "replay_multiple"], 2, "not NAME=VALUE"),
        (["good.json", "--require", ","], 2, "--require names no link"),
        (["absent.json"], 2, "absent.json does not exist"),
        (["bundle/model.onnx"], 7, "bundle/model.onnx is not JSON"),
    ],
)
def test_check_exits_by_its_judgement(here, args, code, words):
    result = run("check", *args)
    assert (result.exit_code, words in result.stderr) == (code, True), result.stderr
    as_json = run("check", *args, "--json")
    assert as_json.exit_code == code
    document = json.loads(as_json.stdout)
    if code in (0, 6):
        assert document["verdict"] == ("failed" if code else "passed")
        assert f"check    {document['verdict']}" in result.stdout
    else:
        assert document["error"]["exit_code"] == code


def test_diff_says_what_changed(here):
    same = run("diff", "good.json", "bundle")
    assert (same.exit_code, same.stdout) == (0, "verdict  passed, before and after; no difference\n")
    changed = run("diff", "good.json", "bad.json")
    assert changed.exit_code == 0
    lines = [" ".join(line.split()) for line in changed.stdout.splitlines()]
    assert lines[2] == "verdict passed failed"
    assert "output logits: times the noise floor 2 9" in lines
    document = json.loads(run("diff", "good.json", "bad.json", "--json").stdout)
    assert document["changes"][0] == {"what": "verdict", "before": "passed", "after": "failed"}
    assert run("diff", "good.json", "absent.json").exit_code == 2
    assert run("diff", "good.json", "bundle/model.onnx").exit_code == 7


def test_schema_is_the_published_one():
    assert run("schema").stdout == schema_text()
