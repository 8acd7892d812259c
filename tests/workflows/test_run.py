"""A run: what is made, what is kept, what a failure and an interrupt leave, and the overview of all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from scconv_deploy.bundle.folder import locked_folder
from scconv_deploy.bundle.manifest import check_bundle
from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.records.run import worst_exit_code
from scconv_deploy.report.runs.load import load_run
from scconv_deploy.workers.local import LocalWorkers
from scconv_deploy.workflows.cell import Cell, pack, unpack
from scconv_deploy.workflows.run import CellsFailedError, plan_run, run_cells
from tests.workers.here import Here
from tests.workflows.cells import make

OUT = Path("out")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def cells(*hows, model="net"):
    """A cell for each: how it is made, and the files that it reads."""
    return [Cell(model, f"v{number}", tuple(how.split())) for number, how in enumerate(hows)]


def done(wanted, workers=None, force=False, progress=lambda text: None, bench=False):
    """(result, names of the cells that were made)"""
    shutil.rmtree("made", ignore_errors=True)
    result = run_cells(plan_run(wanted, OUT, force), make, lambda: workers or Here(), progress, bench)
    made = [line.split()[-1] for mark in sorted(Path("made").glob("*")) for line in mark.read_text().splitlines()]
    return result, sorted(name.removeprefix("out/") for name in made)


def statuses(result):
    return {cell.name: (cell.status, cell.exit_code) for cell in result.record.cells}


def test_a_failed_cell_stops_nothing_else_and_the_worst_code_counts():
    result, made = done(cells("good", "wrong", "refused", "good"))
    assert statuses(result) == {
        "net/v0": ("passed", 0), "net/v1": ("failed", 6), "net/v2": ("error", 4), "net/v3": ("passed", 0),
    }  # fmt: skip
    assert made == ["net/v0", "net/v1", "net/v2", "net/v3"]
    assert not result
    error = CellsFailedError(result)
    assert error.exit_code == 6
    assert error.message.startswith("2 of 4 cells failed; the worst is net/v1: out/net/v1/model.onnx.rejected: ")
    for name in ("v0", "v1", "v3"):
        check_bundle(OUT / "net" / name)
    assert sorted(p.name for p in OUT.iterdir()) == ["index.html", "junit.xml", "net", "run.json", "summary.md"]
    assert sorted(p.name for p in (OUT / "net").iterdir()) == ["v0", "v1", "v3"]


@pytest.mark.parametrize(
    ("codes", "worst"),
    [([], 0), ([0, 0], 0), ([0, 3], 3), ([3, 2], 2), ([2, 4, 3], 4), ([4, 5], 5), ([5, 6], 6), ([6, 7], 7),
     ([7, 1, 6], 1), ([1, 130], 130), ([99, 6], 99)],
)  # fmt: skip
def test_the_order_of_exit_codes(codes, worst):
    assert worst_exit_code(codes) == worst


def test_what_did_not_change_is_not_made_again():
    Path("weights").write_text("1")
    Path("data").mkdir()
    Path("data/a").write_text("1")
    wanted = [*cells("good", "good weights", "wrong"), Cell("net", "data", ("good",), named=("data",))]
    everything = ["net/data", "net/v0", "net/v1", "net/v2"]
    assert done(wanted)[1] == everything
    result, made = done(wanted)
    assert made == []
    assert statuses(result)["net/v2"] == ("failed", 6)  # still
    assert all(cell.unchanged for cell in result.record.cells)
    Path("weights").write_text("2")  # a file that nobody named was opened
    assert done(wanted)[1] == ["net/v1"]
    Path("data/b").write_text("1")
    assert done(wanted)[1] == ["net/data"]
    assert done([Cell("net", "v0", ("good", "weights")), *wanted[1:]])[1] == ["net/v0"]  # another command
    with (OUT / "net/v2/report.json").open("a") as report:
        report.write(" ")
    assert done(wanted[1:])[1] == ["net/v2"]
    shutil.rmtree(OUT / "net/data")
    assert done(wanted[1:])[1] == ["net/data"]
    assert done(wanted[1:], force=True)[1] == ["net/data", "net/v1", "net/v2"]


@pytest.fixture
def timed(monkeypatch):
    """Calls of ``bench``, in whose place each folder takes as many milliseconds as there were calls; no net runs."""
    calls = []

    def bench(folders, options, progress):
        calls.append(sorted(folder.removeprefix("out/") for folder in folders))
        if "odd" in folders[0]:
            raise UsageError("Axis 2 is open.", "Give it a size.")
        return SimpleNamespace(rows=[SimpleNamespace(p50_ms=float(len(calls)))] * len(folders))

    monkeypatch.setattr("scconv_deploy.workflows.bench.bench_artifacts", bench)
    return calls


def latencies(result):
    found = {cell.name: dict(cell.facts.latency_ms) for cell in result.record.cells if cell.facts}
    assert {latency.pop("tensorrt") for latency in found.values()} == {1.25}  # the device's, which the report holds
    return found


def test_variants_of_a_model_are_timed_together_once(timed):
    wanted = cells("good", "wrong", "good", "refused")
    assert latencies(done(wanted)[0]) == {"net/v0": {}, "net/v1": {}, "net/v2": {}}
    assert not timed
    expected = {"net/v0": {"onnxruntime": 1.0}, "net/v1": {}, "net/v2": {"onnxruntime": 1.0}}  # v1 was rejected
    assert latencies(done(wanted, bench=True)[0]) == expected
    assert latencies(done(wanted, bench=True)[0]) == latencies(done(wanted)[0]) == expected
    assert "onnxruntime 1.000 ms" in (OUT / "index.html").read_text()
    assert timed == [["net/v0", "net/v2"]]
    shutil.rmtree(OUT / "net/v0")
    assert latencies(done(wanted, bench=True)[0])["net/v2"] == {"onnxruntime": 2.0}  # beside the new one
    assert latencies(done(wanted, force=True)[0])["net/v2"] == {}


def test_a_model_that_cannot_be_timed_is_told_of_and_stops_nothing(timed):
    said = []
    result, _ = done([*cells("good", model="odd"), *cells("good")], progress=said.append, bench=True)
    assert latencies(result) == {"odd/v0": {}, "net/v0": {"onnxruntime": 2.0}}
    assert result
    assert "odd was not timed: Axis 2 is open." in map(str, said)


def test_another_version_of_a_package_makes_everything_again(monkeypatch):
    assert done(cells("good"))[1] == ["net/v0"]
    monkeypatch.setattr("scconv_deploy.workflows.run.package_digest", lambda name: "another")
    assert done(cells("good"))[1] == ["net/v0"]


def test_a_loaders_data_are_read_again_each_time():
    wanted = [Cell("net", "v0", ("good",), open_ended=True)]
    assert done(wanted)[1] == done(wanted)[1] == ["net/v0"]


def test_an_error_is_tried_again_and_keeps_the_bundle_before():
    done(cells("good"))
    before = check_bundle(OUT / "net/v0")
    assert statuses(done(cells("refused"))[0]) == {"net/v0": ("error", 4)}
    assert done(cells("refused"))[1] == ["net/v0"]
    assert check_bundle(OUT / "net/v0") == before


def test_an_interrupt_keeps_what_is_done_and_names_the_rest():
    said = []

    def progress(text):
        said.append(text)
        if str(text).startswith("net/v1: passed"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        done(cells("good", "good", "good"), Here(order=list), progress=progress)
    assert said[-1] == "2 of 3 cells are done; left: net/v2"
    found = load_run(OUT)
    assert [(cell.status, cell.exit_code) for cell in found.cells] == [("passed", 0), ("passed", 0), ("not done", 130)]
    assert found.exit_code == 130
    assert sorted(p.name for p in OUT.iterdir()) == ["index.html", "junit.xml", "net", "run.json", "summary.md"]
    assert done(cells("good", "good", "good"))[1] == ["net/v2"]


def test_a_killed_process_is_a_failed_cell_and_leaves_nothing():
    result, _ = done(cells("killed", "good"), LocalWorkers(2))
    assert statuses(result) == {"net/v0": ("error", 3), "net/v1": ("passed", 0)}
    assert result.record.cells[0].message.startswith("Its process was killed")
    assert result.record.cells[1].peak_bytes > 1 << 20
    assert [p.name for p in (OUT / "net").iterdir()] == ["v1"]
    assert not list(OUT.glob(".*"))


def test_other_machines_get_what_cells_name_and_send_the_bundle_back(tmp_path):
    """The files are gone from here when the work begins: what arrives was sent."""
    Path("weights").write_text("1")
    wanted = [Cell("net", "v0", ("good", "weights"), named=("weights",)), *cells("good")[:0]]
    expected, _ = done(wanted)
    content = (OUT / "net/v0/model.onnx").read_bytes()

    class Away(Here):
        def run(self, tasks, tell):
            Path("weights").unlink()
            for outcome in super().run(tasks, tell):
                Path("weights").write_text("1")
                yield outcome

    result, _ = done(wanted, Away(elsewhere=True), force=True)
    assert statuses(result) == statuses(expected)
    assert (OUT / "net/v0/model.onnx").read_bytes() == content
    assert result.record.cells[0].inputs.files["weights"] == expected.record.cells[0].inputs.files["weights"]
    assert done(wanted)[1] == []


def test_an_archive_cannot_leave_its_folder(tmp_path):
    import io
    import tarfile

    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../outside"))
    with pytest.raises(tarfile.OutsideDestinationError):
        unpack(stream.getvalue(), tmp_path / "inside")
    Path("a").mkdir()
    Path("a/b").write_text("c")
    unpack(pack(Path("a")), tmp_path / "copy")
    assert (tmp_path / "copy/b").read_text() == "c"


def test_places_that_are_taken_are_refused_before_any_work():
    def refused(words, kind=UsageError):
        with pytest.raises(kind) as caught:
            plan_run(cells("good"), OUT)
        assert words in str(caught.value)

    OUT.write_text("")
    refused("/out is not a folder")
    OUT.unlink()
    OUT.mkdir()
    (OUT / "notes.txt").write_text("mine")
    refused("out exists and is not the folder of a run: it has no run.json")
    (OUT / "run.json").write_text("{}")
    refused("out/run.json is not the record of a run: schema_version is missing", IntegrityError)
    shutil.rmtree(OUT)
    done(cells("good"))
    (OUT / "net/v0/mine.txt").write_text("mine")
    refused("out/net/v0 exists and holds more than the bundle: mine.txt")
    (OUT / "manifest.json").write_text("{}")
    refused("out is a bundle, expected the folder of a run")


def test_a_second_run_into_the_same_folder_is_refused():
    done(cells("good"))
    before = (OUT / "run.json").read_bytes()
    with locked_folder(OUT), pytest.raises(UsageError, match="out is in use: another run writes into it"):
        done(cells("good", "wrong"))
    assert (OUT / "run.json").read_bytes() == before
    assert not (OUT / "net/v1").exists()
    result, made = done(cells("good", "wrong"))
    assert made == ["net/v1"]
    assert statuses(result) == {"net/v0": ("passed", 0), "net/v1": ("failed", 6)}


def test_a_run_that_fails_frees_its_folder():
    def interrupted(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        done(cells("good"), progress=interrupted)
    assert done(cells("good"))[0]


def test_a_newer_record_is_refused():
    done(cells("good"))
    document = json.loads((OUT / "run.json").read_text())
    (OUT / "run.json").write_text(json.dumps(document | {"schema_version": 99}))
    with pytest.raises(Exception, match="has schema version 99; this scconv-deploy reads up to 1"):
        plan_run(cells("good"), OUT)


def test_the_plan_writes_nothing():
    plan = plan_run(cells("good"), OUT)
    assert plan.as_json() == {
        "output": "out",
        "cells": [{"name": "net/v0", "command": "scconv-deploy deploy good -o out/net/v0", "unchanged": False}],
    }
    assert not OUT.exists()


def test_junit_and_json_name_every_cell():
    result, _ = done([*cells("good", "wrong", "refused"), *cells("good", model="other")])
    root = ElementTree.fromstring((OUT / "junit.xml").read_text())
    assert {key: root.get(key) for key in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "1", "errors": "1", "skipped": "0",
    }  # fmt: skip
    kinds = {(case.get("classname"), case.get("name")): case[0].tag for case in root.iter("testcase")}
    assert kinds == {
        ("net", "v0"): "system-out", ("net", "v1"): "failure", ("net", "v2"): "error", ("other", "v0"): "system-out",
    }  # fmt: skip
    document = json.loads((OUT / "run.json").read_text())
    assert document["exit_code"] == result.record.exit_code == 6
    assert [cell["status"] for cell in document["cells"]] == ["passed", "failed", "error", "passed"]
    facts = document["cells"][1]["facts"]
    assert (facts["artifact"], facts["artifact_bytes"]) == ("model.onnx.rejected", len("wrong"))
    assert facts["bundle_bytes"] == sum(p.stat().st_size for p in (OUT / "net/v1").iterdir())
