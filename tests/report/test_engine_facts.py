"""Facts of engines and plans as text."""

from dataclasses import replace

from scconv_deploy.report.engine_facts import plan_facts
from tests.report.made import full_report


def test_a_plan_is_compared_with_its_own_librarys_baseline():
    report = full_report()
    assert plan_facts(report) == {
        "plan model.engine": "3.0 MB at batch 8 in 4 kernels, weights not counted; 1.50x the bytes and "
        "2.0x the kernels of resnet20",
        "plan resnet20": "2.0 MB at batch 8 in 2 kernels, weights not counted",
    }
    other = replace(report.plans[0], backend="tensorrt", batch=None)
    found = plan_facts(replace(report, plans=(other, report.plans[1])))
    assert found["plan model.engine"] == "3.0 MB in 4 kernels, weights not counted"


def test_bytes_that_are_not_known_are_compared_with_nothing():
    report = full_report()
    hidden = replace(report.plans[0], bytes_moved=None)
    found = plan_facts(replace(report, plans=(hidden, report.plans[1])))
    assert found["plan model.engine"] == "4 kernels, whose bytes open axes hide, weights not counted"
