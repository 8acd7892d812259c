"""JUnit XML of a report for CI systems: one test case per check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from xml.etree import ElementTree

from scconv_deploy.records.parity import Check, ParityReport
from scconv_deploy.report.engine_facts import engine_facts, plan_facts
from scconv_deploy.report.escaping import visible
from scconv_deploy.report.explained import CHECKS


def to_junit(report: ParityReport) -> str:
    """Render a report as JUnit XML: one suite per link, and one for the static checks of SRUs.

    A failure holds its reason and what to do; a check that did not run is skipped with its reason.
    """
    root = ElementTree.Element("testsuites", name=f"scconv-deploy {visible(report.model)}")
    for link in report.links:
        _add_suite(root, report, link.name, link.checks or (Check(link.name, link.status, link.reason),))
    if report.srus:
        statics = [Check(sru.site, sru.static.status, sru.static.reason) for sru in report.srus]
        _add_suite(root, report, "SRUs", statics)
    for key in ("tests", "failures", "skipped"):
        root.set(key, str(sum(int(suite.get(key, 0)) for suite in root)))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _add_suite(root: ElementTree.Element, report: ParityReport, name: str, checks: Iterable[Check]) -> None:
    checks = list(checks)
    statuses = Counter(check.status for check in checks)
    suite = ElementTree.SubElement(
        root, "testsuite", name=visible(name), tests=str(len(checks)), failures=str(statuses["failed"]),
        errors="0", skipped=str(statuses["not run"]),
    )  # fmt: skip
    properties = ElementTree.SubElement(suite, "properties")
    facts = {"artifact": report.artifact, "artifact_sha256": report.artifact_sha256, **report.provenance}
    for engine in report.engines:
        if engine.backend == name:
            facts |= engine_facts(engine) | {f"engine {key}": value for key, value in engine.provenance.items()}
    facts |= plan_facts(report)
    facts |= {f"tolerance {key}": f"{value:g}" for key, value in report.overrides.items()}
    for key, value in facts.items():
        ElementTree.SubElement(properties, "property", name=visible(key), value=visible(value))
    seen: Counter[str] = Counter()
    for check in checks:
        seen[check.name] += 1  # CI systems merge cases of one name
        case_name = check.name if seen[check.name] == 1 else f"{check.name} ({seen[check.name]})"
        case = ElementTree.SubElement(
            suite, "testcase", classname=visible(f"{report.model}.{name}"), name=visible(case_name)
        )
        reason = visible(check.reason)
        if check.status == "failed":
            then = f"\nWhat to do: {CHECKS[check.name].remedy}" if check.name in CHECKS else ""
            ElementTree.SubElement(case, "failure", message=reason, type="parity").text = reason + then
        elif check.status == "not run":
            ElementTree.SubElement(case, "skipped", message=reason)
        else:
            ElementTree.SubElement(case, "system-out").text = reason
