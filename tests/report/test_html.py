"""The page, parsed: every fact is in it as text, and nothing in it points outside."""

import math
import re
import sys
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from scconv_deploy.errors import MissingRuntimeError
from scconv_deploy.records.gates import FlipCount
from scconv_deploy.records.parity import Check, Histogram, LayerError, Link
from scconv_deploy.report import pictures, render
from scconv_deploy.report.explained import CHECKS, STEPS, TERMS
from tests.made_once import key_of, once
from tests.report.made import HOSTILE, full_report, hostile_report

pytest.importorskip("matplotlib", reason="the pictures are drawn by matplotlib")
pytestmark = pytest.mark.usefixtures("drawn_pictures")
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


def html(report):
    """The page; each report's is drawn once, half a second a picture."""
    return once(key_of("page", report), lambda: render.to_html(report))


def page(report):
    return Page(html(report))


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
        assert not re.search(r"url\((?!#)|@import", html(report).split("</style>")[0])
    assert ("meta", "name", "viewport") in found.attributes


def test_pictures_name_their_rows_and_their_references_are_in_the_same_picture():
    text = html(full_report())
    drawn = re.findall("<svg.*?</svg>", text, re.S)
    assert len(drawn) == 5  # flips, margins, layers, plans, worst inputs
    assert all("layer1.SRU" in svg and "currentColor" in svg for svg in drawn[:2])
    assert {"1e-04", "1e-03", "1e-02", "1e-01"} <= set(re.findall(r">(1e-\d\d)<", drawn[1]))  # the rare bins too
    assert "resnet20, 2.0 MB at batch 8 in 2 kernels" in drawn[3]
    assert "seeded noise [1]" in drawn[4]
    identities = [set(re.findall(r' id="([^"]+)"', svg)) for svg in drawn]
    for svg, own in zip(drawn, identities, strict=True):
        assert set(re.findall(r'(?:href="|url\()#([^")]+)', svg)) <= own
    assert sum(map(len, identities)) == len(set().union(*identities))


@pytest.mark.parametrize("error", [4.1e-4, 1e-3, math.inf])
def test_errors_within_one_decade_still_have_numbers_beside_them(error):
    layers = tuple(LayerError(f"t{i}", "", error, 4.9e-4) for i in range(3))
    drawn = re.findall("<svg.*?</svg>", render.to_html(replace(full_report(), layers=layers)), re.S)[2]
    assert {"1e-04", "1e-03"} <= set(re.findall(r">(1e-\d\d)<", drawn))


def margins_of(lowest, highest):
    edges = tuple(10.0**power for power in range(lowest, highest + 1))
    made = replace(full_report().srus[0], site="backbone.stage3.block12.conv2.SRU")  # as wide as names are shown
    return replace(made, margins=Histogram(edges, (1,) * (len(edges) - 1)))


def drawn_in(text, title):
    found = re.search(f"<h3>{re.escape(title)}</h3>\\s*(<svg.*?</svg>)", text, re.S)
    return found and found[1]


@pytest.mark.parametrize(("lowest", "highest"), [(-8, 2), (-7, 1), (-4, -1), (-1, 0)])
def test_labels_of_margins_do_not_meet_and_letters_are_not_tiny(lowest, highest):
    """At a phone's width of 390 px the picture is 366 px wide."""
    svg = drawn_in(
        render.to_html(replace(full_report(), srus=(margins_of(lowest, highest),))),
        "How close the gates are to the edge",
    )
    scale = 366 / float(re.search(r'viewBox="0 0 (\S+)', svg)[1])
    sizes = {float(size) * scale for size in re.findall(r"font-size: (\S+)px", svg)}
    assert min(sizes) >= 10.5
    labels = re.findall(r'font-size: (\S+)px[^>]*text-anchor: middle[^>]* x="(\S+)"[^>]*>(\de[+-]\d\d)<', svg)
    assert 2 <= len(labels) <= 4
    places = sorted(float(x) for _, x, _ in labels)
    widest = float(labels[0][0]) * 0.64 * len(labels[0][2])  # DejaVu Sans: a digit is 0.64 em wide
    assert min(after - before for before, after in pairwise(places)) > widest


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["layer1.SRU", "layer2.SRU"], ["layer1.SRU", "layer2.SRU"]),  # short enough as they are
        (
            [f"features.denseblock{b}.denselayer{i}.conv2.SRU" for b in (1, 2) for i in (1, 2)],
            [f"denseblock{b}.denselayer{i}" for b in (1, 2) for i in (1, 2)],
        ),
        (["backbone.stage3.block12.conv2.SRU"], ["backbone...k12.conv2.SRU"]),
        (["same.name.of.a.module.called.twice"] * 2, ["twice"] * 2),
        (["a.module.with.a.long.path.SRU", "SRU"], ["a.module...long.path.SRU", "SRU"]),
    ],
)  # fmt: skip
def test_long_names_stay_apart(names, shown):
    assert pictures._shortened(names) == shown
    assert max(map(len, shown)) <= 24


def test_where_no_gate_changed_it_says_so_and_draws_nothing():
    still = replace(full_report().srus[0], teacher_forced=FlipCount(500), free_running=None)
    text = render.to_html(replace(full_report(), srus=(still,)))
    assert drawn_in(text, "Gates changed, per SRU") is None
    assert "No gate changed, on the same input or running free." in Page(text).text
    assert drawn_in(html(full_report()), "Gates changed, per SRU")
    assert "No gate changed" not in page(full_report()).text


def test_what_failed_comes_with_what_to_do_and_words_are_explained():
    failed, passed = page(full_report(ratio=9.0)).text, page(full_report()).text
    remedy = f"What to do: {CHECKS['replay'].remedy}"
    assert remedy in failed
    assert "What to do" not in passed  # its static check was not run, and that needs no remedy but its reason
    assert "Do not ship it." in failed
    assert "computes what the model computes, in every link of the chain that passed" in passed
    for text in (failed, passed):
        assert all(f"{term} {meaning}" in text for term, meaning in TERMS.items())
        assert CHECKS["replay"].compares.replace("`", "") in text
        assert CHECKS["weights"].compares not in text  # the report holds no such check
    unjudged = Link.of("onnxruntime", [Check("seal", "not run", "model.onnx changed")])
    bare = replace(full_report(), links=(unjudged,))
    assert f"What to do: {CHECKS['seal'].remedy.replace('`', '')}" in page(bare).text
    assert "no link ran, so nothing is proved" in page(bare).text
    assert (bare.verdict, bool(bare)) == ("not run", False)


def test_each_link_says_what_it_is_and_half_numbers_are_said_to_be_half():
    made = full_report()
    half = replace(made, links=(*made.links, Link.of("precision", [Check("replay", "passed", "close")])))
    for report, said in ((made, False), (half, True)):
        text = page(report).text
        assert all(STEPS[link.name] in text for link in report.links)
        assert ("Gates, layers and outputs are those of the half-precision file." in text) is said


def test_limits_that_decided_stand_apart_from_the_others():
    text = page(full_report()).text
    shown = text[text.index("Tolerances tolerance") : text.index("Stages")]
    assert "smallest_floor" not in shown[: (fold := shown.index("1 more, which decided no check of this report"))]
    assert all(name in shown[:fold] for name in ("unexplained_flips", "replay_multiple", "largest_floor"))
    assert "smallest_floor" in shown[fold:]


def test_equal_reports_are_equal_files():
    assert render.to_html(full_report()) == html(full_report())


def test_without_data_there_is_no_picture():
    bare = replace(full_report(), srus=(), layers=(), worst_inputs=(), accuracy=None, plans=())
    assert "svg" not in page(bare).tags
    odd = replace(full_report().srus[0], margins=Histogram((), (1,)))  # a report that was changed by hand
    assert "layer1.SRU" in page(replace(bare, srus=(odd,))).text


def test_hostile_names_are_text():
    found = page(hostile_report())
    shown = " ".join(HOSTILE.replace("\x1b", "\\x1b").split())
    assert found.text.count(shown) >= 15
    assert "\x1b" not in html(hostile_report())


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
    pages = {"page.html.j2", "report.html.j2", "run.html.j2", "sensitivity.html.j2", "int8_costs.html.j2"}
    assert {path.name for path in packed} == pages
