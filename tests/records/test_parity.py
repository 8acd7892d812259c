"""Records: the verdict, and JSON without NaN."""

import json

from scconv_deploy.records.gates import FlipCount, Refusal
from scconv_deploy.records.metrics import OutputMetrics
from scconv_deploy.records.parity import Check, Link, OutputParity, ParityReport, SRUParity
from scconv_deploy.records.stage import StageLog

PASSED = Check("static", "passed", "bit for bit")
FAILED = Check("gates", "failed", "3 gates")


def report(*links, error=1e-7):
    metrics = OutputMetrics(1.0, 0.5, float("inf"), 0.25, None, None)
    sru = SRUParity("a.SRU", "groupbn-hard (G=16)", PASSED, FlipCount(10), FlipCount(10, 3, 1), 0.5)
    return ParityReport(
        model="net",
        artifact="model.onnx",
        artifact_sha256="0" * 64,
        links=links,
        srus=(sru,),
        outputs=(OutputParity("logits", metrics, error, 5e-8, True),),
        samples=("noise",),
        left_alone=(Refusal("norm", "it is not an SRU"),),
        provenance={"torch": "2"},
    )


def test_one_failed_check_fails_link_and_report():
    bad = report(Link.of("onnxruntime", [PASSED, FAILED]))
    assert not bad
    assert bad.verdict == "failed"
    assert bad.failures == ("onnxruntime: 3 gates",)
    assert bad.links[0].reason == "3 gates"
    assert report(Link.of("onnxruntime", [PASSED]), Link("engine", "not run", "no engine"))


def test_a_link_that_failed_without_a_check_is_a_failure_too():
    bad = report(Link("engine", "failed", "its output has another shape"), Link.of("onnxruntime", [FAILED, FAILED]))
    assert bad.failures[0] == "engine: its output has another shape"
    assert bad.headline == "engine: its output has another shape (and 2 more)"
    assert bad.as_json()["failures"] == list(bad.failures)


def test_the_headline_of_a_pass_counts_gates_and_says_what_did_not_run():
    good = report(Link.of("onnxruntime", [PASSED]), Link("engine", "not run", "no engine"))
    assert good.headline == ("same input, gates changed: 3 of 10; replay error 2.0x the noise floor; not run: engine")


def test_json_has_no_infinity_and_derives_the_ratio():
    document = json.loads(json.dumps(report(Link.of("l", [PASSED])).as_json(), allow_nan=False))
    assert document["outputs"][0]["end_to_end"]["relative_l2"] == "inf"
    assert document["outputs"][0]["replay_ratio"] == 2.0
    assert document["srus"][0]["teacher_forced"]["unexplained"] == 1
    assert document["left_alone"] == [{"path": "norm", "reason": "it is not an SRU"}]


def test_stages_keep_order_and_what_was_skipped():
    log = StageLog()
    with log.stage("first") as stage:
        stage.applied.append("one thing")
    with log.stage("second") as stage:
        stage.skipped.append(("candidate", "reason"))
    first, second = log.records
    assert (first.name, first.applied, first.skipped) == ("first", ("one thing",), ())
    assert second.skipped == (("candidate", "reason"),)
    assert first.seconds >= 0
