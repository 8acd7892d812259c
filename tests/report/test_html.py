"""The page, parsed: every fact is in it as text, and nothing in it points outside."""

import math
import re
import sys
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.report import render
from scconv_deploy.report.records import Histogram, LayerError
from tests.report.made import HOSTILE, full_report, hostile_report

pytest.importorskip("matplotlib", reason="the pictures are drawn by matplotlib")
ROOT = Path(__file__).parents[2]
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Text, attributes and tags of a page; fails on a tag that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.words, self.attributes, self.tags, self._open = [], [], [], []
        self.feed(text)
        self.close()
        assert self._open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.words.append(data)


def page(report):
    return Page(render.to_html(report))


def test_every_site_reason_limit_and_fact_is_in_the_page(real_report):
    for report in (real_report, full_report(ratio=9.0)):
        text = page(report).text
        facts = [link.name for link in report.links] + [c.reason for link in report.links for c in link.checks]
        facts += [link.reason for link in report.links if not link.checks]
        facts += [sru.site for sru in report.srus] + [sru.variant for sru in report.srus]
        facts += [t.reason for t in report.tolerances.values()] + list(report.tolerances)
        facts += [word for stage in report.stages for pair in stage.skipped for word in pair]
        facts += [line for stage in report.stages for line in stage.applied]
        facts += [word for refusal in report.left_alone for word in (refusal.path, refusal.reason)]
        facts += [*report.provenance, *report.provenance.values(), *report.samples, report.artifact_sha256]
        facts += [layer.name for layer in report.layers] + [worst.sample for worst in report.worst_inputs]
        assert [fact for fact in facts if " ".join(fact.split()) not in text] == []


def test_the_verdict_and_its_reason_come_first():
    text = page(full_report(ratio=9.0)).text
    reason = "onnxruntime: logits: replay error 9.0e-07, 9.0x the noise floor 1.0e-07 (limit 8x)"
    assert text.index("failed") < text.index(reason) < text.index("Chain")
    assert "Tolerance changed: replay_multiple 8.5, usually 8" in text[: text.index("Chain")]
    assert "passed net.py:make same input, gates changed: 4 of 1,000; replay error 2.0x" in page(full_report()).text


def test_it_needs_no_network_and_no_script(real_report):
    for report in (real_report, full_report(), hostile_report()):
        found = page(report)
        assert "script" not in found.tags
        assert not set(found.tags) & {"link", "iframe", "object", "embed", "img", "base", "form"}
        points = [value for _, name, value in found.attributes if name in ("src", "href", "xlink:href", "action")]
        assert [value for value in points if not value.startswith("#")] == []
        assert not [a for a in found.attributes if a[1].startswith("on")]
        assert not re.search(r"url\((?!#)|@import", render.to_html(report).split("</style>")[0])
    assert ("meta", "name", "viewport") in found.attributes


def test_pictures_name_their_rows_and_their_references_are_in_the_same_picture():
    text = render.to_html(full_report())
    drawn = re.findall("<svg.*?</svg>", text, re.S)
    assert len(drawn) == 4  # flips, margins, layers, worst inputs
    assert all("layer1.SRU" in svg and "currentColor" in svg for svg in drawn[:2])
    assert {"1e-04", "1e-03", "1e-02", "1e-01"} <= set(re.findall(r">(1e-\d\d)<", drawn[1]))  # the rare bins too
    assert "seeded noise [1]" in drawn[3]
    identities = [set(re.findall(r' id="([^"]+)"', svg)) for svg in drawn]
    for svg, own in zip(drawn, identities, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= own
    assert sum(map(len, identities)) == len(set().union(*identities))


@pytest.mark.parametrize("error", [4.1e-4, 1e-3, math.inf])
def test_errors_within_one_decade_still_have_numbers_beside_them(error):
    layers = tuple(LayerError(f"t{i}", "", error, 4.9e-4) for i in range(3))
    drawn = re.findall("<svg.*?</svg>", render.to_html(replace(full_report(), layers=layers)), re.S)[2]
    assert {"1e-04", "1e-03"} <= set(re.findall(r">(1e-\d\d)<", drawn))


def test_equal_reports_are_equal_files():
    assert render.to_html(full_report()) == render.to_html(full_report())


def test_without_data_there_is_no_picture():
    bare = replace(full_report(), srus=(), layers=(), worst_inputs=(), accuracy=None)
    assert "svg" not in page(bare).tags
    odd = replace(full_report().srus[0], margins=Histogram((), (1,)))  # a report that was changed by hand
    assert "layer1.SRU" in page(replace(bare, srus=(odd,))).text


def test_hostile_names_are_text():
    found = page(hostile_report())
    shown = " ".join(HOSTILE.replace("\x1b", "\\x1b").split())
    assert found.text.count(shown) >= 15
    assert "\x1b" not in render.to_html(hostile_report())


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_its_command(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingRuntimeError, match=f"needs {package}.*pip install jinja2 matplotlib"):
        render.to_html(full_report())
    with pytest.raises(MissingRuntimeError, match=package):
        render.format_of(Path("report.html"))
    assert render.format_of(Path("report.md")) == "markdown"
    assert render.render(full_report(), "markdown").startswith("### Parity passed")


def test_the_template_is_in_the_wheel():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = ROOT / "scconv_deploy" / "report"
    packed = {path for pattern in patterns["scconv_deploy.report"] for path in folder.glob(pattern)}
    assert packed == set((folder / "templates").iterdir())
    assert {path.name for path in packed} == {"report.html.j2"}
