"""The published schema describes what is written, and refuses what is not."""

import json
from pathlib import Path

import pytest

from scconv_deploy.report.render import to_json
from scconv_deploy.report.schema import report_schema, schema_text
from tests.report.made import full_report, hostile_report
from tests.report.test_load import broken

Draft202012Validator = pytest.importorskip("jsonschema").Draft202012Validator
PUBLISHED = Path(__file__).parents[2] / "docs" / "report.schema.json"


def closed(schema):
    """The schema with no room for a field that it does not describe."""
    if isinstance(schema, dict):
        inner = {key: closed(value) for key, value in schema.items()}
        return inner | ({"additionalProperties": False} if "properties" in schema else {})
    return [closed(value) for value in schema] if isinstance(schema, list) else schema


def test_the_published_file_is_what_the_records_say():
    assert PUBLISHED.read_text() == schema_text()  # otherwise: scconv-deploy report schema > docs/report.schema.json


def test_reports_are_valid_and_hold_nothing_that_is_not_described(real_report):
    Draft202012Validator.check_schema(report_schema())
    validator = Draft202012Validator(closed(report_schema()))
    for report in (real_report, full_report(), full_report(ratio=float("nan")), hostile_report()):
        validator.validate(json.loads(to_json(report)))


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda d: d.pop("verdict"), []),
        (lambda d: d.pop("artifact_sha256"), []),
        (lambda d: d.update(schema_version=2), ["schema_version"]),
        (lambda d: d.update(verdict="maybe"), ["verdict"]),
        (lambda d: d["links"][1]["checks"][0].update(status="good"), ["links", 1, "checks", 0, "status"]),
        (
            lambda d: d["links"][1]["checks"][1]["quantities"][0].pop("limit"),
            ["links", 1, "checks", 1, "quantities", 0],
        ),
        (lambda d: d["srus"][0].update(open_share="half"), ["srus", 0, "open_share"]),
        (lambda d: d["stages"][1]["skipped"].append(["one"]), ["stages", 1, "skipped", 1]),
        (lambda d: d["provenance"].update(torch=2), ["provenance", "torch"]),
    ],
)
def test_a_broken_document_is_invalid_where_it_is_broken(change, where):
    errors = list(Draft202012Validator(report_schema()).iter_errors(broken(change)))
    assert [list(error.absolute_path) for error in errors] == [where]


def test_fields_are_described_by_their_docstrings():
    definitions = report_schema()["$defs"]
    assert definitions["OutputParity"]["properties"]["noise_floor"]["description"].startswith(
        "largest relative L2 between"
    )
    assert definitions["FlipCount"]["properties"]["largest_margin"]["description"] == (
        "largest |margin| / s of a flip; 0.0 without one."
    )
    assert definitions["Quantity"]["required"] == ["tolerance", "value", "limit"]
    assert "quantities" not in definitions["Check"]["required"]
