"""JUnit, parsed back."""

from dataclasses import replace
from xml.etree import ElementTree

from scconv_deploy.records.parity import Check, Link
from scconv_deploy.report.explained import CHECKS
from scconv_deploy.report.junit import to_junit
from tests.report.made import HOSTILE, full_report, hostile_report


def test_one_case_a_check_with_its_reason():
    root = ElementTree.fromstring(to_junit(full_report(ratio=9.0)))
    assert root.tag == "testsuites"
    assert {key: root.get(key) for key in ("tests", "failures", "skipped")} == {
        "tests": "7", "failures": "1", "skipped": "2",
    }  # fmt: skip
    found = [
        (suite.get("name"), case.get("name"), *[(answer.tag, answer.get("message") or answer.text) for answer in case])
        for suite in root
        for case in suite.iter("testcase")
    ]
    assert found == [
        ("PyTorch with SRUs swapped", "gates", ("system-out", "no gate changed")),
        (
            "onnxruntime",
            "teacher-forced gates",
            ("system-out", "same input, gates changed: 3 of 1,000 (0 unexplained)"),
        ),
        (
            "onnxruntime",
            "replay",
            ("failure", "logits: replay error 9.0e-07, 9.0x the noise floor 1.0e-07 (limit 8x)"),
        ),
        ("onnxruntime", "static", ("skipped", "no scconv node")),
        ("engine", "engine", ("skipped", "no engine was built")),
        ("SRUs", "layer1.SRU", ("system-out", "bit for bit")),
        ("SRUs", "layer2.SRU", ("system-out", "bit for bit")),
    ]
    facts = {p.get("name"): p.get("value") for p in root[1].iter("property")}
    assert facts["artifact_sha256"] == "ab" * 32
    assert facts["torch"] == "2.13.0"
    assert facts["tolerance replay_multiple"] == "8.5"


def test_a_failure_says_what_to_do():
    root = ElementTree.fromstring(to_junit(full_report(ratio=9.0)))
    (failure,) = root.iter("failure")
    assert failure.text == f"{failure.get('message')}\nWhat to do: {CHECKS['replay'].remedy}"


def test_every_check_and_bare_link_is_one_case_of_its_status(real_report):
    kinds = {"passed": "system-out", "failed": "failure", "not run": "skipped"}
    bare = Link("tensorrt", "failed", "crashed halfway")  # a failed link without checks
    for report in (real_report, full_report(9.0, 1), replace(full_report(), links=(bare, *full_report().links))):
        cases = list(ElementTree.fromstring(to_junit(report)).iter("testcase"))
        told = [(answer.tag, answer.get("message") or answer.text) for case in cases for answer in case]
        asked = [c for k in report.links for c in k.checks or (Check(k.name, k.status, k.reason),)]
        asked += [sru.static for sru in report.srus]
        assert told == [(kinds[c.status], c.reason) for c in asked]


def test_checks_of_one_name_stay_apart():
    report = full_report()
    twice = type(report.links[1])("l", "passed", "r", (report.links[1].checks[1],) * 2)
    root = ElementTree.fromstring(to_junit(type(report)(**{**vars(report), "links": (twice,), "srus": ()})))
    assert [case.get("name") for case in root.iter("testcase")] == ["replay", "replay (2)"]


def test_hostile_names_are_text():
    root = ElementTree.fromstring(to_junit(hostile_report()))  # an ESC would not even parse
    shown = HOSTILE.replace("\x1b", "\\x1b")
    assert root[0].get("name") == shown
    assert root[0].find("testcase/failure").text == shown
    assert {element.tag for element in root.iter()} == {
        "testsuites", "testsuite", "properties", "property", "testcase", "failure", "skipped",
    }  # fmt: skip
