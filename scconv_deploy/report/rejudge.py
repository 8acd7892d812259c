"""Verdict on a stored report, with the same or other tolerances. Nothing runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from scconv_deploy.errors import IntegrityError, UsageError
from scconv_deploy.records.parity import Check, Link, ParityReport, Status
from scconv_deploy.report.load import load_report, unsealed_files
from scconv_deploy.system.backends import BACKENDS

ENGINES = tuple(BACKENDS)
"""Names of engine links. Without an engine, a chain has the link "engine" with the reason; as a requirement, "engine"
stands for all engine links of a report."""


FUSED = "onnxruntime+fused"
"""Link of ONNX Runtime with the fused SRU for CPUs, which shows no gate either."""


@dataclass(frozen=True)
class Judgement:
    """Result of ``report check``; true if the report may be signed.

    Attributes:
        report: report with the new limits, and its checks judged by them.
        stored_verdict: verdict in the stored report.
        required: names of the links that must have passed.
        lacking: reasons for required links that have not passed, or without any gate compared.
    """

    report: ParityReport
    stored_verdict: Status
    required: tuple[str, ...]
    lacking: tuple[str, ...]

    @property
    def failures(self) -> tuple[str, ...]:
        """Reasons not to sign: required links that have not passed, and failed checks."""
        return (*self.lacking, *self.report.failures)

    def __bool__(self) -> bool:
        return not self.failures

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": "passed" if self else "failed",
            "failures": list(self.failures),
            "stored_verdict": self.stored_verdict,
            "required": list(self.required),
            "overrides": self.report.overrides,
            "links": [{"name": link.name, "status": link.status, "reason": link.reason} for link in self.report.links],
        }


def check_report(path: Path, require: Sequence[str] = (), overrides: Mapping[str, float] | None = None) -> Judgement:
    """Judge a stored report again; ``scconv-deploy report check``.

    Args:
        path: a ``report.json``, or a bundle, whose files must match its manifest.
        require: names of links that must have passed.
        overrides: new limits by tolerance.

    Raises:
        UsageError: an unknown link or tolerance.
        IntegrityError, MissingRuntimeError: see :func:`.load.load_report`; or a file of the bundle changed.
    """
    stored = load_report(path)
    if path.is_dir() and (changed := unsealed_files(path)):
        raise IntegrityError(
            f"{path}: {', '.join(changed)} changed after the report was written.", "Verify the artifact again."
        )
    report = rejudge(stored, overrides or {})
    lacking = tuple(reason for name in require for reason in _lacking(report, name))
    return Judgement(report, stored.verdict, tuple(require), lacking)


def rejudge(report: ParityReport, overrides: Mapping[str, float]) -> ParityReport:
    """Judge every check with stored numbers by its old or new limits.

    Raises:
        UsageError: the report does not have a tolerance, or no check stored a number for it.
    """
    kept = {q.tolerance for link in report.links for check in link.checks for q in check.quantities}
    for name, limit in overrides.items():
        if name not in report.tolerances:
            raise UsageError(f"There is no tolerance {name}.", f"Known: {', '.join(report.tolerances)}.")
        if not (math.isfinite(limit) and limit >= 0):
            raise UsageError(f"Tolerance {name} cannot be {limit}.", "Give a finite number, 0 or larger.")
        if name not in kept:
            raise UsageError(
                f"The report holds no number that was held against {name}, so it cannot be judged again by it.",
                f"Can be changed: {', '.join(sorted(kept)) or 'none'}. Otherwise verify the artifact again.",
            )
    links = tuple(_rejudged_link(link, overrides) for link in report.links)
    return replace(report, links=links, overrides={**report.overrides, **overrides})


def _rejudged_link(link: Link, overrides: Mapping[str, float]) -> Link:
    return Link.of(link.name, [_rejudged(check, overrides) for check in link.checks]) if link.checks else link


def _rejudged(check: Check, overrides: Mapping[str, float]) -> Check:
    unexplained = check.status == "failed" and all(q.within for q in check.quantities)
    if not check.quantities or check.status == "not run" or unexplained:
        return check  # decided without numbers
    quantities = tuple(replace(q, limit=overrides.get(q.tolerance, q.limit)) for q in check.quantities)
    changed = [
        f"{new.tolerance} {new.value:.3g} against {new.limit:g} instead of {old.limit:g}"
        for old, new in zip(check.quantities, quantities, strict=True)
        if new.limit != old.limit
    ]
    broken = [f"{q.tolerance} {q.value:.3g} exceeds {q.limit:g}" for q in quantities if not q.within]
    status: Literal["passed", "failed"] = "failed" if broken else "passed"
    if status != check.status and not changed:  # the stored status contradicts the numbers
        changed = broken or ["every number within its limit"]
    reason = f"{check.reason}; judged again: {', '.join(changed)}" if changed else check.reason
    return Check(check.name, status, reason, quantities)


def _unseen_gates(link: Link) -> str:
    """Reason why no gate of a passed engine was compared; "" if one was, or if the model has no SRU.

    A wrong gate can hide in the end-to-end noise of explained flips. So a required engine, or fused SRU, must have
    gates compared.
    """
    if link.name not in (*ENGINES, FUSED) or link.status != "passed":
        return ""
    names = ("teacher-forced gates", "SRUs alone", "gates inside")
    found = [c for name in names for c in link.checks if c.name == name]
    if not found or any(c.status == "passed" for c in found):
        return ""
    return f"passed end to end only: {found[0].reason}"  # older reports have the second check alone


def _lacking(report: ParityReport, name: str) -> list[str]:
    """Reasons why a required link has not passed; empty if it has."""
    links = [link for link in report.links if link.name.lower() == name.lower()]
    if name.lower() == "engine":  # all engine links
        links += [link for link in report.links if link.name in ENGINES]
    if links:
        unpassed = [f"{name} is required and {k.status}: {k.reason}" for k in links if k.status != "passed"]
        return unpassed + [f"{name} is required and {why}" for k in links if (why := _unseen_gates(k))]
    if name.lower() in ENGINES:
        why = next((link.reason for link in report.links if link.name == "engine"), "the report has no such link")
        return [f"{name} is required and not run: {why}"]
    known = [link.name for link in report.links]
    known += [engine for engine in ENGINES if engine not in known]
    raise UsageError(f"There is no link {name}.", f"Known: {', '.join(known)}.")
