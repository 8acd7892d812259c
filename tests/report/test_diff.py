"""What changed between two reports, and nothing else."""

from dataclasses import replace
from io import StringIO

from rich.console import Console

from scconv_deploy.records.parity import Check, Link
from scconv_deploy.records.stage import StageRecord
from scconv_deploy.report.diff import Change, diff_reports
from scconv_deploy.report.text import print_diff
from tests.report.made import full_report, sru

SRU_FACTS = {
    "variant": "groupbn-hard (G=4)",
    "static": "passed",
    "open": "62.5%",
    "gates changed, same input": "2 (0 unexplained)",
    "gates changed, running free": "7 (0 unexplained)",
}


def test_equal_reports_do_not_differ_and_seconds_are_not_compared():
    assert not diff_reports(full_report(), full_report())
    slower = replace(full_report(), stages=(StageRecord("export", 99.0),))
    assert diff_reports(full_report(), slower).changes == ()


def test_verdict_links_flips_ratios_and_versions_in_this_order():
    before = full_report()
    after = replace(full_report(ratio=9.0), provenance={"torch": "2.14.0", "command": "scconv-deploy verify"})
    after = replace(after, srus=(sru("layer1.SRU", 1), sru("layer3.SRU")), overrides={"replay_multiple": 8.0})
    after = replace(after, accuracy=replace(after.accuracy, artifact=0.5))
    found = {change.what: (change.before, change.after) for change in diff_reports(before, after).changes}
    reason = "logits: replay error 9.0e-07, 9.0x the noise floor 1.0e-07 (limit 8x)"
    assert list(found.items()) == [
        ("verdict", ("passed", "failed")),
        ("link onnxruntime", ("passed", "failed")),
        ("link onnxruntime: replay", ("passed", f"failed: {reason}")),
        ("accuracy of the artifact", ("90.00% of 100", "50.00% of 100")),
        ("tolerance replay_multiple", ("8.5", "8")),
        ("SRU layer1.SRU: gates changed, same input", ("2 (0 unexplained)", "2 (1 unexplained)")),
        *((f"SRU layer2.SRU: {what}", (text, "")) for what, text in SRU_FACTS.items()),
        *((f"SRU layer3.SRU: {what}", ("", text)) for what, text in SRU_FACTS.items()),
        ("output logits: replay error", ("2e-07", "9e-07")),
        ("output logits: times the noise floor", ("2", "9")),
        ("torch", ("2.13.0", "2.14.0")),
        ("command", ("scconv-deploy deploy net.py:make -o out", "scconv-deploy verify")),
    ]


def test_what_only_the_second_report_has_stands_with_its_kind():
    made = full_report()
    engine = Link("tensorrt-rtx", "not run", "no GPU here can run it")
    precision = Link.of("precision", [Check("range", "failed", "conv reaches 7e+04")])
    after = replace(made, links=(*made.links[:2], precision, engine), first_departure="conv: too large")
    before = replace(made, first_departure="")
    assert [change.what for change in diff_reports(before, after).changes] == [
        "verdict", "link engine", "link precision", "link precision: range", "link tensorrt-rtx", "departs first",
    ]  # fmt: skip
    found = {change.what: (change.before, change.after) for change in diff_reports(before, after).changes}
    assert found["link engine"] == ("not run: no engine was built", "")
    assert found["link precision: range"] == ("", "failed: conv reaches 7e+04")
    assert found["link tensorrt-rtx"] == ("", "not run: no GPU here can run it")


def test_as_json():
    other = replace(full_report(), artifact_sha256="cd" * 32)
    assert diff_reports(full_report(), other).changes == (Change("artifact sha256", "ab" * 32, "cd" * 32),)
    assert diff_reports(full_report(), other).as_json() == {
        "verdict": {"before": "passed", "after": "passed"},
        "changes": [{"what": "artifact sha256", "before": "ab" * 32, "after": "cd" * 32}],
    }


def test_a_verdict_that_stays_is_said_too():
    console = Console(file=StringIO(), width=200)
    print_diff(console, diff_reports(full_report(), replace(full_report(), model="other.py:make")))
    print_diff(console, diff_reports(full_report(9.0), full_report(9.0)))
    print_diff(console, diff_reports(full_report(), full_report(9.0)))
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "verdict  passed, before and after"
    assert "verdict  failed, before and after; no difference" in lines
    assert sum("before and after" in line for line in lines) == 2
