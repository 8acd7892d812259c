"""Costs of sites and plans as text: bounded tables, exact and lost outputs, options that a shell takes."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from scconv_deploy.records.sensitivity import SHOWN, BudgetSearch, Cost, SearchStep, Sensitivity, SiteCost
from scconv_deploy.report.html import sensitivity_page
from scconv_deploy.report.pictures import sensitivity_picture
from scconv_deploy.report.sensitivity import as_options, cost_words, print_search, print_sensitivity, search_lines

pytest.importorskip("matplotlib", reason="the pictures are drawn by matplotlib")
pytestmark = pytest.mark.usefixtures("drawn_pictures")
COST = Cost(10, 33.26, 0.02, 3, 10, 5, 1000)


def sensitivity(count: int, adds: float | None = 0.25) -> Sensitivity:
    sites = tuple(
        SiteCost(f"layer{i}", "Conv", Cost(10, 20.0 + i), 1 / count, adds and adds / count, 0.5 / count)
        for i in range(count)
    )
    return Sensitivity("net.onnx", "data.npz", "max", sites, COST, 1000 if adds else None, 4000)


def text(printer, value) -> list[str]:
    stream = io.StringIO()
    printer(Console(file=stream, width=200), value)
    return stream.getvalue().splitlines()


def test_rows_are_bounded_and_the_rest_is_summed():
    lines = text(print_sensitivity, sensitivity(SHOWN + 5))
    names = [line.split()[0] for line in lines]
    assert names.count("layer0") == 1
    assert f"layer{SHOWN}" not in names
    (rest,) = [line.split() for line in lines if line.startswith("5 more")]
    assert rest[2:] == ["20.0%", "5.0%", "10.0%"]
    (anyway,) = [line.split() for line in lines if line.startswith("in float anyway")]
    assert anyway[3:] == ["75.0%", "50.0%"]
    (together,) = [line.split() for line in lines if line.startswith("all sites together")]
    assert together[3:] == ["33.3", "2.00%", "3", "of", "10", "0.50%"]


def test_an_unknown_shape_is_a_dash():
    (anyway,) = [line.split() for line in text(print_sensitivity, sensitivity(3, None)) if "anyway" in line]
    assert anyway[3:] == ["-", "50.0%"]


def test_words_of_a_cost():
    assert cost_words(COST) == "accuracy falls by 2.00%, SNR 33.3 dB, 3 of 10 answers changed, 0.50% of gates changed"
    assert cost_words(Cost(10, math.inf)) == "SNR exact dB"
    assert cost_words(Cost(10, -math.inf)) == "SNR not finite dB"


def test_options_are_quoted_for_a_shell():
    assert as_options("--keep", ["a.b", "/x y/Conv"]) == "--keep a.b --keep '/x y/Conv'"


def test_a_search_shows_what_was_taken():
    steps = (SearchStep("all sites in int8", 0, 0.9, COST, False), SearchStep("the worst", 1, 0.8, COST, True),
             SearchStep("a in int8 again", 0, 0.85, COST, False))  # fmt: skip
    search = BudgetSearch("1%", 2, ("a",), steps, 1)
    lines = [line.split()[-1] for line in text(print_search, search)[2:5]]
    assert lines == ["beyond", "taken", "beyond"]
    assert search_lines(search)[-1] == "budget 1%: taken is the worst; the same without a search: --keep a"
    assert search_lines(search)[0].endswith(f"90.0% of the multiply-adds in int8: {cost_words(COST)}; beyond")


def test_a_picture_has_the_costliest_sites_and_colours_those_in_float():
    found = sensitivity(SHOWN + 5)
    drawn, kept = sensitivity_picture(found), sensitivity_picture(found, ("layer0",))
    assert drawn.svg.count("layer") == SHOWN
    assert "The 5 others cost less." in drawn.caption
    assert "#d9532c" not in drawn.svg
    assert kept.svg.count("#d9532c") == 1


def test_a_page_has_every_site_and_escapes_names():
    found = sensitivity(SHOWN + 5)
    hostile = SiteCost("<script>", "Conv", COST, 0.1, 0.1, 0.1)
    page = sensitivity_page(Sensitivity("<b>", "d", "max", (*found.sites, hostile), COST, 1000, 4000))
    assert f"<td>layer{SHOWN + 4}</td>" in page
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "<b>" not in page
