"""What was written is read back; what is no report is refused by name."""

import json
from dataclasses import replace

import pytest

from scconv_deploy.bundle.manifest import MANIFEST, manifest_bytes
from scconv_deploy.errors import IntegrityError, MissingRuntimeError, UsageError
from scconv_deploy.records import tolerances
from scconv_deploy.report.load import from_json, load_report
from scconv_deploy.report.render import to_json
from tests.report.made import full_report


def document(report):
    return json.loads(to_json(report))


def bundle(folder, report, model=b"onnx"):
    folder.mkdir()
    (folder / "report.json").write_text(to_json(report))
    (folder / "model.onnx").write_bytes(model)
    (folder / MANIFEST).write_bytes(manifest_bytes(folder, {}))
    return folder


def test_records_to_json_and_back_are_equal(real_report):
    for report in (full_report(), full_report(ratio=9.0), replace(full_report(), srus=(), stages=()), real_report):
        assert from_json(document(report)) == report
    assert full_report().layers[1].relative_l2 == float("inf")  # infinities make the journey too


def test_an_old_report_without_the_optional_fields_loads():
    old = document(full_report())
    for name in ("layers", "first_departure", "worst_inputs", "accuracy", "overrides", "tolerances", "failures"):
        del old[name]
    for sru in old["srus"]:
        del sru["free_running"], sru["margins"], sru["jump"]
    for link in old["links"]:
        for check in link["checks"]:
            del check["quantities"]
    for output in old["outputs"]:
        del output["end_to_end"]["psnr_db"], output["end_to_end"]["quantiles_abs"]
    report = from_json(old)
    assert (report.layers, report.accuracy, report.overrides) == ((), None, {})
    assert report.tolerances == tolerances.ALL | tolerances.FIXED
    assert report.srus[0].teacher_forced == full_report().srus[0].teacher_forced
    assert report.outputs[0].end_to_end.quantiles_abs == {}


def test_unknown_fields_of_a_later_version_are_ignored():
    assert from_json(document(full_report()) | {"colour": "blue"}) == full_report()


def broken(change):
    found = document(full_report())
    change(found)
    return found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("schema_version"), "no schema_version"),
        (lambda d: d.update(schema_version="1"), "no schema_version"),
        (lambda d: d.update(schema_version=True), "no schema_version"),
        (lambda d: d.pop("links"), "links is missing"),
        (lambda d: d.update(links={}), "links is {}, expected a list"),
        (
            lambda d: d["links"][1].update(status="good"),
            r"links\[1\].status is \"good\", expected 'passed' or 'failed'",
        ),
        (lambda d: d["srus"][1].update(open_share="half"), r"srus\[1\].open_share is \"half\", expected a number"),
        (lambda d: d["srus"][0]["teacher_forced"].update(flips=1.5), r"teacher_forced.flips is 1.5, expected int"),
        (lambda d: d["srus"][0]["teacher_forced"].update(flips=True), r"teacher_forced.flips is true, expected int"),
        (lambda d: d["stages"][1]["skipped"].append(["one"]), r"skipped\[1\] is \[\"one\"\], expected 2 entries"),
        (lambda d: d["provenance"].update(torch=2), r"provenance\['torch'\] is 2, expected str"),
        (lambda d: d.update(verdict="failed"), "verdict is 'failed', the links say 'passed'"),
        (lambda d: d["links"][1]["checks"][0].update(status="failed"), "link onnxruntime is passed, its checks say"),
    ],
)
def test_a_broken_document_is_refused_by_the_field(change, words):
    with pytest.raises(IntegrityError, match=words):
        from_json(broken(change))


@pytest.mark.parametrize("text", ["", "not json", "[]", "3", "null", "[" * 100_000, '{"verdict": "passed"}'])
def test_a_file_that_is_no_report_is_refused(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(IntegrityError, match=r"report\.json"):
        load_report(path)


def test_a_newer_schema_says_who_can_read_it():
    with pytest.raises(MissingRuntimeError, match="schema version 2; this scconv-deploy reads up to 1"):
        from_json(document(full_report()) | {"schema_version": 2})


def test_a_bundle_is_read_and_one_whose_report_changed_is_not(tmp_path):
    folder = bundle(tmp_path / "bundle", full_report())
    assert load_report(folder) == full_report()
    (folder / "report.json").write_text(to_json(full_report(ratio=1.0)))
    with pytest.raises(IntegrityError, match="not the report that the bundle was sealed with"):
        load_report(folder)


def test_what_is_not_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        load_report(tmp_path / "absent.json")
    with pytest.raises(UsageError, match="not a bundle"):
        load_report(tmp_path)
