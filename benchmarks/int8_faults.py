"""A small ScConv-ResNet in int8, damaged on purpose: which checks catch each fault, with its model and without."""

from __future__ import annotations

import argparse

import onnx

from benchmarks.harness import write
from scconv_deploy.records.parity import ParityReport
from tests import int8

_COLUMNS = {
    "fault": "fault",
    "verdict": "verdict",
    "caught by": "caught_by",
    "against the float file alone": "without_the_model",
    "why it is hidden": "hidden",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options but the common ones."""


def run(options: argparse.Namespace) -> None:
    reference, floats = int8.reference()
    model = int8.quantize(floats)
    rows = []
    for name, fault in {"none": None, **int8.FAULTS}.items():
        damaged = onnx.ModelProto.FromString(model.SerializeToString())
        if fault is not None:
            fault.damage(damaged)
        hidden = "" if fault is None else fault.hidden
        alone = int8.judge_against_float(floats, damaged)
        rows.append(_row(name, int8.judge(reference, damaged), hidden) | {"without_the_model": _caught(alone)})
    with int8.weight_on_a_tie(reference, model) as with_code:
        for name, code, hidden in (
            ("a weight on a tie rounded the other way", 11, int8.TIE_IS_HIDDEN), ("the same, a code further", 12, "")
        ):  # fmt: skip
            rows.append(_row(name, int8.judge(reference, with_code(code)), hidden))
    write(options.results, rows, _COLUMNS)


def _row(name: str, report: ParityReport, hidden: str) -> dict[str, str]:
    return {"fault": name, "verdict": report.verdict, "caught_by": _caught(report), "hidden": hidden}


def _caught(report: ParityReport) -> str:
    return ", ".join(sorted(int8.failed_checks(report)))
