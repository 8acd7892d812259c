"""A stored report under other limits: the numbers decide, not the words."""

import json
from dataclasses import replace

import pytest

from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.records.parity import Link
from scconv_deploy.records.tolerances import parse_values
from scconv_deploy.report.load import from_json
from scconv_deploy.report.rejudge import check_report, rejudge
from scconv_deploy.report.render import to_json
from tests.report.made import full_report, gates, replay
from tests.report.test_load import bundle


def stored(report):
    return from_json(json.loads(to_json(report)))


def test_a_tighter_limit_flips_the_verdict_and_a_looser_one_flips_it_back():
    report = stored(full_report(ratio=2.0))
    tight = rejudge(report, {"replay_multiple": 1.5})
    assert (report.verdict, tight.verdict) == ("passed", "failed")
    assert tight.failures == (
        "onnxruntime: logits: replay error 2.0e-07, 2.0x the noise floor 1.0e-07 (limit 8x); "
        "judged again: replay_multiple 2 against 1.5 instead of 8",
    )
    assert tight.overrides == {"replay_multiple": 1.5}
    assert rejudge(stored(tight), {"replay_multiple": 2.0}).verdict == "passed"  # a limit may be reached


def test_each_tolerance_decides_its_own_numbers():
    bad = full_report(unexplained=2)
    assert rejudge(bad, {"replay_multiple": 100.0}).verdict == "failed"
    assert rejudge(bad, {"unexplained_flips": 1}).verdict == "failed"
    assert rejudge(bad, {"unexplained_flips": 2}).verdict == "passed"
    assert rejudge(full_report(), {"largest_floor": 1e-8}).verdict == "failed"


def test_a_number_that_is_none_fails_whatever_the_limit():
    report = replace(full_report(), links=(Link.of("onnxruntime", [replay(float("nan"))]),))
    assert not rejudge(report, {"replay_multiple": 1e9})


def test_a_status_that_the_numbers_do_not_bear_out_is_corrected():
    forged = replace(gates(5), status="passed")
    report = replace(full_report(), links=(Link.of("onnxruntime", [forged]),))
    assert report.verdict == "passed"
    assert rejudge(report, {}).failures[0].endswith("judged again: unexplained_flips 5 exceeds 0")


def test_a_failure_that_no_number_explains_stays_one():
    other = replace(replay(2.0), status="failed", reason="the output is missing")
    unread = replace(gates(0), status="not run", reason="no gate can be read")
    report = replace(full_report(), links=(Link.of("onnxruntime", [other, unread]),))
    assert rejudge(report, {"replay_multiple": 100.0, "unexplained_flips": 5}).links == report.links


def test_a_real_report_keeps_the_numbers_of_every_check_with_a_limit(real_report):
    assert rejudge(real_report, {}) == real_report
    checks = [check for link in real_report.links for check in link.checks]
    assert [c.name for c in checks if ("limit" in c.reason or "unexplained" in c.reason) and not c.quantities] == []
    kept = {check.name: {q.tolerance for q in check.quantities} for check in checks}
    assert "replay_multiple" in kept["replay"] & kept["whole model"]
    assert kept["teacher-forced gates"] == kept["gates"] == {"unexplained_flips"}
    assert kept["values"] == {"swapped_values"}
    outputs = {q.value for c in checks for q in c.quantities if c.name == "replay" and q.tolerance == "replay_multiple"}
    assert outputs == {output.replay_ratio for output in real_report.outputs}
    ratio = max(q.value for c in checks for q in c.quantities if q.tolerance == "replay_multiple")
    assert rejudge(real_report, {"replay_multiple": ratio / 2}).verdict == "failed"
    assert rejudge(real_report, {"replay_multiple": ratio * 1.01}).verdict == "passed"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"replay": 1.0}, "no tolerance replay.*Known: .*replay_multiple"),
        ({"replay_multiple": -1.0}, "cannot be -1"),
        ({"replay_multiple": float("inf")}, "cannot be inf"),
        ({"smallest_floor": 1e-9}, "no number that was held against smallest_floor.*replay_multiple"),
    ],
)
def test_a_limit_that_cannot_be_applied_is_refused(overrides, words):
    with pytest.raises(UsageError, match=words):
        rejudge(full_report(), overrides)


def test_overrides_are_parsed_or_refused():
    assert parse_values(["replay_multiple=4", " unexplained_flips = 1 "]) == {
        "replay_multiple": 4.0, "unexplained_flips": 1.0,
    }  # fmt: skip
    for text in ("replay_multiple", "replay_multiple=", "replay_multiple=x"):
        with pytest.raises(UsageError, match="not NAME=VALUE"):
            parse_values([text])


def write(path, report):
    path.write_text(to_json(report))
    return path


def test_a_required_link_must_have_passed(tmp_path):
    path = write(tmp_path / "report.json", full_report())
    assert check_report(path, ["onnxruntime", "PyTorch with SRUs swapped"])
    lacking = check_report(path, ["onnxruntime", "engine", "tensorrt"])
    assert not lacking
    assert lacking.failures == (
        "engine is required and not run: no engine was built",
        "tensorrt is required and not run: no engine was built",
    )
    assert lacking.as_json()["verdict"] == "failed"
    assert lacking.as_json()["stored_verdict"] == "passed"


def test_a_required_link_that_failed_and_a_failed_check_are_reasons(tmp_path):
    found = check_report(write(tmp_path / "report.json", full_report(ratio=9.0)), ["onnxruntime"])
    assert found.failures[0].startswith("onnxruntime is required and failed: logits: replay error 9.0e-07")
    assert not check_report(tmp_path / "report.json")  # without a requirement too


def test_a_report_in_which_nothing_ran_proves_nothing(tmp_path):
    idle = replace(full_report(), links=(Link("engine", "not run", "no engine was built"),))
    assert check_report(write(tmp_path / "a.json", idle)).failures == ("no link ran, so nothing is proved",)
    assert not check_report(write(tmp_path / "b.json", replace(idle, links=())))


def test_an_unknown_link_is_refused_with_the_known_ones(tmp_path):
    path = write(tmp_path / "report.json", full_report())
    with pytest.raises(UsageError, match=r"no link onnxruntim.*PyTorch with SRUs swapped, onnxruntime, engine"):
        check_report(path, ["onnxruntim"])


def test_a_bundle_whose_artifact_changed_since_is_not_signed(tmp_path):
    folder = bundle(tmp_path / "bundle", full_report())
    (folder / "device").mkdir()
    (folder / "device" / "report.json").write_text("{}")  # written after sealing, as finish does
    assert check_report(folder, ["onnxruntime"])
    (folder / "model.onnx").write_bytes(b"another")
    with pytest.raises(IntegrityError, match=r"model\.onnx changed after the report"):
        check_report(folder)
