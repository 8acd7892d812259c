"""What changed between two reports, and nothing else."""

from dataclasses import replace

from scconv_deploy.report.diff import Change, diff_reports
from scconv_deploy.report.records import StageRecord
from tests.report.made import full_report, sru


def test_equal_reports_do_not_differ_and_seconds_are_not_compared():
    assert not diff_reports(full_report(), full_report())
    slower = replace(full_report(), stages=(StageRecord("export", 99.0),))
    assert diff_reports(full_report(), slower).changes == ()


def test_verdict_links_flips_ratios_and_versions_in_this_order():
    before = full_report()
    after = replace(full_report(ratio=9.0), provenance={"torch": "2.14.0", "command": "scconv-deploy verify"})
    after = replace(after, srus=(sru("layer1.SRU", 1), sru("layer3.SRU")), overrides={"replay_multiple": 8.0})
    found = {change.what: (change.before, change.after) for change in diff_reports(before, after).changes}
    assert next(iter(found.items())) == ("verdict", ("passed", "failed"))
    assert found["link onnxruntime"] == ("passed", "failed")
    assert found["link onnxruntime: replay"] == ("passed", "failed")
    assert found["SRU layer1.SRU: flips, same input"] == ("2 (0 unexplained)", "2 (1 unexplained)")
    assert found["SRU layer2.SRU: static"] == ("passed", "")
    assert found["SRU layer3.SRU: static"] == ("", "passed")
    assert found["output logits: replay_ratio"] == ("2", "9")
    assert found["tolerance replay_multiple"] == ("8.5", "8")
    assert found["torch"] == ("2.13.0", "2.14.0")
    assert "link PyTorch with SRUs swapped" not in found
    assert "artifact sha256" not in found


def test_as_json():
    other = replace(full_report(), artifact_sha256="cd" * 32)
    assert diff_reports(full_report(), other).changes == (Change("artifact sha256", "ab" * 32, "cd" * 32),)
    assert diff_reports(full_report(), other).as_json() == {
        "changes": [{"what": "artifact sha256", "before": "ab" * 32, "after": "cd" * 32}]
    }
