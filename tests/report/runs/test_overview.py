"""The overview of a run: every cell in every format, names and reasons escaped."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from scconv_deploy.records.codec import decode
from scconv_deploy.records.run import SCHEMA_VERSION, CellFacts, CellRecord, Inputs, RunRecord
from scconv_deploy.report.runs.facts import facts_of, headline
from scconv_deploy.report.runs.load import load_run
from scconv_deploy.report.runs.render import overview_files, to_json, to_junit, to_markdown
from tests.report.made import HOSTILE
from tests.report.test_html import Page

FACTS = CellFacts(
    "model.onnx", 1_234_567, 2_345_678, 0.9012, 0.9034, {"tensorrt": 1.2345}, {"model.tensorrt.engine": 735_000_000}
)
CELLS = (
    CellRecord("r20", "single", "r20/single", "scconv-deploy deploy a", "passed", 0, "all good", digest="d",
               seconds=3.0, facts=FACTS, inputs=Inputs({"net.py": "1"}, {"torch": "2"})),
    CellRecord("r20", "half", "r20/half", "scconv-deploy deploy b", "failed", 6, "gates differ", "Do not ship it.",
               digest="e", unchanged=True, facts=replace(FACTS, accuracy=None, latency_ms={}, moved_bytes={})),
    CellRecord("own", "single", "own/single", "scconv-deploy deploy c", "error", 4, "odd graph", "Even it."),
    CellRecord("own", "half", "own/half", "scconv-deploy deploy d", "not done", 130, "The run ended before."),
)  # fmt: skip
RUN = RunRecord(SCHEMA_VERSION, CELLS)


def page(record):
    pytest.importorskip("jinja2")
    return Page(overview_files(record)["index.html"].decode())


def test_the_record_is_read_as_it_was_written(tmp_path):
    (tmp_path / "run.json").write_text(to_json(RUN))
    assert load_run(tmp_path) == load_run(tmp_path / "run.json") == RUN
    assert decode(RunRecord, json.loads(to_json(RUN)), unknown="ignore").exit_code == 130


def test_facts_are_words():
    assert facts_of(CELLS[0]) == {
        "accuracy": "90.12% (reference 90.34%)", "artifact": "1.2 MB", "latency": "tensorrt 1.234 ms",
        "bytes moved": "model.tensorrt.engine 735.0 MB",
    }  # fmt: skip
    assert set(facts_of(CELLS[2]).values()) == {""}
    assert headline(RUN) == "4 cells: 1 passed, 1 failed, 1 error, 1 not done"


def test_every_cell_and_fact_is_on_the_page():
    found = page(RUN)
    for cell in CELLS:
        for text in (cell.name, cell.message, cell.remedy, cell.command, *facts_of(cell).values()):
            assert text in found.text
    assert "unchanged" in found.text
    assert "2,345,678" in found.text
    links = [value for tag, name, value in found.attributes if tag == "a" and name == "href"]
    assert links == ["r20/single/report.html", "r20/half/report.html"]
    assert not re.search(r"https?://|<script", overview_files(RUN)["index.html"].decode())


def test_nothing_that_users_write_is_markup():
    cell = replace(CELLS[1], model="m", variant="v", folder="m/v", message=HOSTILE, remedy=HOSTILE, command=HOSTILE)
    record = RunRecord(SCHEMA_VERSION, (cell,))
    plain, hostile = page(RunRecord(SCHEMA_VERSION, (replace(cell, message="", remedy="", command=""),))), page(record)
    assert hostile.tags == plain.tags
    root = ElementTree.fromstring(to_junit(record))
    assert [case.get("name") for case in root.iter("testcase")] == ["v"]
    assert len(to_markdown(record).splitlines()) == 5
    assert "<" not in to_markdown(record)


def test_the_summary_has_a_row_for_each_cell():
    lines = to_markdown(RUN).splitlines()
    assert lines[0] == "### 4 cells: 1 passed, 1 failed, 1 error, 1 not done"
    assert [line.split(" | ")[:2] for line in lines[4:]] == [
        ["| `r20/single`", "passed"], ["| `r20/half`", "**failed**"],
        ["| `own/single`", "**error**"], ["| `own/half`", "**not done**"],
    ]  # fmt: skip


def test_a_missing_jinja2_leaves_the_page_out(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scconv_deploy.report.runs.html", None)
    assert sorted(overview_files(RUN)) == ["junit.xml", "run.json", "summary.md"]
