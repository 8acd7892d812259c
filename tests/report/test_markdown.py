"""Markdown for a pull request."""

import re
from dataclasses import replace
from pathlib import Path

from scconv_deploy.records.parity import Check, Link
from scconv_deploy.report.escaping import code, markdown
from scconv_deploy.report.markdown import to_markdown
from tests.report.made import full_report, hostile_report

GOLDEN = (Path(__file__).parent / "golden.md").read_text()


def test_the_whole_document():
    assert to_markdown(full_report(ratio=9.0)) == GOLDEN


def tables(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_it_parses_back_into_tables_of_even_rows():
    for report in (full_report(), hostile_report()):
        columns = 0
        for line in tables(to_markdown(report)):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            columns = len(cells) if cells[0].strip() in ("link", "site", "output", "module", "what") else columns
            assert len(cells) == columns, line


def test_several_failures_are_all_listed_and_caveats_too():
    text = to_markdown(full_report(ratio=9.0, unexplained=2))
    assert text.splitlines()[2:6] == [
        "2 checks failed:", "",
        "- onnxruntime: same input, gates changed: 3 of 1,000 (2 unexplained)",
        "- onnxruntime: logits: replay error 9.0e-07, 9.0x the noise floor 1.0e-07 (limit 8x)",
    ]  # fmt: skip
    assert "- not inspected: onnxruntime: no scconv node" in to_markdown(full_report())


def test_without_srus_and_outputs_there_is_no_empty_table():
    bare = replace(full_report(), srus=(), outputs=(), left_alone=(), overrides={}, engines=(), plans=())
    bare = replace(bare, links=(Link.of("onnxruntime", [Check("contract", "failed", "output is missing")]),))
    text = to_markdown(bare)
    assert text.splitlines()[:3] == ["### Parity failed: `net.py:make`", "", "onnxruntime: output is missing"]
    assert re.findall("<summary>(.*)</summary>", text) == ["Provenance"]


def test_where_it_departs_and_the_accuracy_are_in_sight_whatever_is_folded():
    for outputs in (full_report().outputs, ()):  # an engine's report has none
        text = to_markdown(replace(full_report(ratio=9.0), outputs=outputs))
        seen = re.sub("<details>.*?</details>", "", text, flags=re.S)
        assert "Departs first: relu\\_1: not finite\n" in seen
        assert "Accuracy on 100 samples: reference 91.00%, artifact 90.00%, difference -1.00 points" in seen


def test_hostile_names_are_text():
    text = to_markdown(hostile_report())
    assert "<script" not in text
    assert "\x1b" not in text
    assert "@all" not in re.sub("`[^`]*`", "", text)
    assert set(re.findall(r"</?(\w+)", text)) == {"details", "summary"}


def test_escaping():
    assert markdown("a|b *c* <d> @e\nf#1") == r"a&#124;b \*c\* &lt;d&gt; &#64;e f&#35;1"
    assert code("layer1.conv_2") == "`layer1.conv_2`"
    assert code("a`b|c") == r"a\`b&#124;c"
    assert code("") == ""
