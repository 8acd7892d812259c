"""Tables for a terminal say what the records say."""

import io

from rich.console import Console

from scconv_deploy.records.parity import Link
from scconv_deploy.report import text
from tests.records.test_parity import FAILED, PASSED, report


def printed(printer, result, width=160):
    stream = io.StringIO()
    printer(Console(file=stream, width=width), result)
    return stream.getvalue()


def test_report_names_links_srus_outputs_and_the_verdict():
    output = printed(
        text.print_report, report(Link.of("onnxruntime", [PASSED, FAILED]), Link("engine", "not run", "none"))
    )
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert "left alone: norm: it is not an SRU" in lines
    assert "onnxruntime passed bit for bit" in lines
    assert "failed 3 gates" in lines
    assert "engine not run none" in lines
    assert "a.SRU groupbn-hard 10 50% 3 1 passed" in lines
    assert "logits 1.0e-07 5.0e-08 2.0x inf 1.0e+00 -" in lines
    assert lines[-2:] == ["parity failed", "onnxruntime: 3 gates"]


def test_long_reasons_are_whole_in_a_narrow_terminal():
    words = " ".join(f"word{i}" for i in range(40))
    output = printed(text.print_report, report(Link("engine", "not run", words)), width=60)
    assert all(f"word{i}" in output for i in range(40))


def test_names_are_not_taken_for_markup():
    output = printed(text.print_report, report(Link("engine", "not run", "[bold]net[0].conv[/bold]")))
    assert "[bold]net[0].conv[/bold]" in output
