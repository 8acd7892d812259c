"""Two runs compared: cells that came and went, and what changed in their bundles."""

from __future__ import annotations

from scconv_deploy.report.runs.diff import diff_runs
from scconv_deploy.workflows.cell import Cell
from scconv_deploy.workflows.run import plan_run, run_cells
from tests.workers.here import Here
from tests.workflows.cells import make


def made(folder, *hows):
    cells = [Cell("net", f"v{number}", (how,)) for number, how in enumerate(hows)]
    run_cells(plan_run(cells, folder), make, Here)
    return folder


def test_changes_are_named_after_their_cells(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = made(tmp_path / "a", "good", "good", "refused", "refused")
    after = made(tmp_path / "b", "good", "wrong", "good", "refused", "good")
    found = diff_runs(before, after / "run.json")
    assert found.verdicts == ("failed (exit code 4)", "failed (exit code 6)")
    changes = {change.what: (change.before, change.after) for change in found.changes}
    assert changes["net/v1: verdict"] == ("passed", "failed")
    assert changes["net/v2: status"] == ("error: The graph is odd.", "passed")
    assert changes["cell net/v4"] == ("", "passed")
    assert not any(what.startswith(("net/v0", "net/v3")) for what in changes)
    assert not diff_runs(after, after)
