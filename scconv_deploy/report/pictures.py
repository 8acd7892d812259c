"""Pictures of a report as inline SVG: text stays text, in the page's colour."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter, NullLocator

from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.sensitivity import SHOWN, Sensitivity, SiteCost
from scconv_deploy.report.escaping import visible
from scconv_deploy.report.example_picture import CAPTION, draw_example

_WIDTH_IN = 3.7  # 266 points: at a phone's width, letters of 9 points are twelve pixels high
_ROW_IN = 0.2
_LONGEST_NAME = 24
_INK = "#0a0b0c"  # replaced by currentColor, for dark mode
_GOOD, _BAD, _FAINT = "#2f80c9", "#d9532c", "#8a8f98"
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none", "font.size": 9, "text.parse_math": False, "axes.unicode_minus": False,
    "figure.constrained_layout.use": True,
    "text.color": _INK, "axes.edgecolor": _INK, "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "font.family": "sans-serif",
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """SVG element, its title, and how to read it."""

    title: str
    caption: str
    svg: str


def pictures(report: ParityReport) -> dict[str, Picture]:
    """Draw the pictures of a report: ``flips``, ``margins``, ``layers``, ``worst``, ``plans``,
    ``example-N``, ``sensitivity``."""
    drawn: dict[str, Picture] = {}
    if any(count.flips for sru in report.srus for count in (sru.teacher_forced, sru.free_running) if count):
        drawn["flips"] = Picture(
            "Gates changed, per SRU",
            "Logarithmic. Explained changes (blue, grey) lie within rounding; an unexplained one (red) is a fault.",
            _svg("flips", len(report.srus), lambda axes: _flips(axes, report)),
        )
    if any(sru.margins and sum(sru.margins.counts) for sru in report.srus):
        drawn["margins"] = Picture(
            "How close the gates are to the edge",
            "The reference's gates by their distance |margin| / s from the threshold: the stronger the colour, the "
            "more. The red mark is the nearest of an SRU, the number counts its gates. Rounding moves those at the "
            "left first.",
            _svg("margins", len(report.srus), lambda axes: _margins(axes, report)),
        )
    if report.layers:
        drawn["layers"] = Picture(
            "Error per layer",
            "The inputs of the SRUs, in the graph's order, with PyTorch's gates: distance from PyTorch, PyTorch's own "
            "rounding noise, and the limit. The first above the limit is where to look.",
            _svg("layers", 11, lambda axes: _layers(axes, report)),
        )
    if report.worst_inputs:
        drawn["worst"] = Picture(
            "Worst inputs",
            "Relative L2 of the whole model, running free, on the inputs where it is largest.",
            _svg("worst", len(report.worst_inputs), lambda axes: _worst(axes, report)),
        )
    if any(plan.bytes_moved for plan in report.plans):
        drawn["plans"] = Picture(
            "Bytes moved, kernel by kernel",
            "The sum of inputs and outputs of the kernels so far, in the order in which they run. A line's end is its "
            "plan's total; the thick pieces are SRUs.",
            _svg("plans", 11, lambda axes: _plans(axes, report)),
        )
    for number, example in enumerate(report.accuracy.examples if report.accuracy else ()):
        name, draw = f"example-{number}", partial(draw_example, example=example, colours=(_GOOD, _BAD))
        drawn[name] = Picture(example.name, CAPTION if number == 0 else "", _svg(name, 9, draw))
    for stage in report.stages:
        if stage.search is not None and stage.search.sensitivity is not None:
            drawn["sensitivity"] = sensitivity_picture(stage.search.sensitivity, stage.search.keep)
    return drawn


def sensitivity_picture(result: Sensitivity, kept: Sequence[str] = ()) -> Picture:
    """Draw what each int8 site costs beside its share of the work; sites left in float in another colour."""
    shown = result.sites[:SHOWN]
    more = f" The {len(result.sites) - SHOWN} others cost less." if len(result.sites) > SHOWN else ""
    return Picture(
        "Noise of each int8 site, and its share of the work",
        "Each site alone in int8: its part of the sum of all sites' noise at the outputs (red: left in float), "
        f"and its part of the multiply-adds (grey). A long coloured bar with a short grey one is worth float.{more}",
        _svg("sensitivity", len(shown), lambda axes: _sensitivity(axes, shown, kept)),
    )


def _sensitivity(axes: Axes, sites: Sequence[SiteCost], kept: Sequence[str]) -> None:
    rows = range(len(sites))
    noise = [100 * one.noise_share for one in sites]
    work = [
        100 * (one.weight_bytes_share if one.multiply_adds_share is None else one.multiply_adds_share) for one in sites
    ]
    axes.barh([row - 0.2 for row in rows], noise, 0.4, color=[_BAD if one.site in kept else _GOOD for one in sites])
    axes.barh([row + 0.2 for row in rows], work, 0.4, color=_FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter("{x:g} %")
    axes.set_xlim(0, None)
    axes.set_xlabel("part of noise, of work (grey)")
    _name_rows(axes, [one.site for one in sites])


def _flips(axes: Axes, report: ParityReport) -> None:
    rows = range(len(report.srus))
    series: list[tuple[str, list[int], str]] = []
    forced = [s.teacher_forced for s in report.srus]
    series.append(("same input, explained", [c.flips - c.unexplained if c else 0 for c in forced], _GOOD))
    if any(s.free_running for s in report.srus):
        free = [s.free_running for s in report.srus]
        series.append(("running free, explained", [f.flips - f.unexplained if f else 0 for f in free], _FAINT))
        bad = [(c.unexplained if c else 0) + (f.unexplained if f else 0) for c, f in zip(forced, free, strict=True)]
    else:
        bad = [c.unexplained if c else 0 for c in forced]
    series.append(("unexplained", bad, _BAD))
    height = 0.8 / len(series)
    for index, (label, values, colour) in enumerate(series):
        places = [row + (index - (len(series) - 1) / 2) * height for row in rows]
        axes.barh(places, values, height, label=label, color=colour)
    axes.set_xscale("symlog", linthresh=1)
    highest = max(max(values) for _, values, _ in series)
    axes.set_xlim(0, 2 * highest)
    axes.xaxis.set_major_locator(FixedLocator([0, *_decades(1, 2 * highest)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("gates")
    _name_rows(axes, [sru.site for sru in report.srus])
    axes.figure.legend(loc="outside lower center", ncols=1)


def _margins(axes: Axes, report: ParityReport) -> None:
    ends: list[float] = []  # ends of the bins with gates, for the limits of the logarithmic axis
    for row, sru in enumerate(report.srus):
        if sru.margins is None or not (total := sum(sru.margins.counts)):
            continue
        most = max(sru.margins.counts)
        bins = [
            (left, right, count)
            for (left, right), count in zip(pairwise(sru.margins.edges), sru.margins.counts, strict=False)
            if count
        ]
        for left, right, count in bins:
            # shares of a millionth matter and must be visible
            shade = 0.12 + 0.88 * max(0.0, 1 + math.log10(count / most) / 6)
            start = max(left, 1e-12)
            ends += [start, right]
            axes.barh(row, right - start, 0.86, left=start, color=_GOOD, alpha=shade, lw=0)
        axes.annotate(
            _short(total), (1, row), xycoords=("axes fraction", "data"), xytext=(3, 0), textcoords="offset points",
            va="center", size=8,
        )  # fmt: skip
        axes.plot([right for _, right, _ in bins[:1]], [row] * len(bins[:1]), "|", color=_BAD, ms=8)
    axes.set_xscale("log")
    if ends:
        axes.set_xlim(min(ends), max(ends))
        axes.xaxis.set_major_locator(FixedLocator(_decades(min(ends), max(ends))))
    axes.xaxis.set_major_formatter("{x:.0e}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("|margin| / s")
    _name_rows(axes, [sru.site for sru in report.srus])


def _decades(lowest: float, highest: float) -> list[float]:
    """At most four powers of ten for a logarithmic axis, so that labels do not overlap."""
    first, last = math.ceil(math.log10(lowest) - 1e-9), math.floor(math.log10(highest) + 1e-9)
    step = max(1, math.ceil((last - first + 1) / 4))
    return [10.0**power for power in range(last, first - 1, -step)][::-1] or [lowest, highest]


def _short(count: int) -> str:
    """Short form of a count, such as 1.4M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)


def _layers(axes: Axes, report: ParityReport) -> None:
    errors = [layer.relative_l2 for layer in report.layers]
    floors = [layer.floor for layer in report.layers]
    limit = _limit(report)
    limits = [limit * floor for floor in floors]
    usable = [v for v in errors + floors + limits if math.isfinite(v) and v > 0] or [1e-8]
    lowest = min(usable) / 3
    places = range(len(errors))
    axes.plot(places, [_drawable(v, lowest) for v in errors], "o-", ms=3, lw=1, color=_GOOD, label="artifact")
    axes.plot(places, [_drawable(v, lowest) for v in floors], "-", lw=1, color=_FAINT, label="noise floor")
    if limit:
        axes.plot(places, [_drawable(v, lowest) for v in limits], "--", lw=1, color=_BAD, label=f"limit, {limit:.3g}x")
    lost = [index for index, value in enumerate(errors) if not math.isfinite(value)]
    if lost:
        axes.plot(lost, [max(usable) * 3] * len(lost), "x", color=_BAD, label="not finite")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.0e}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    highest = max(usable) * (3 if lost else 1.01)
    # whole decades, because only they are labelled
    axes.set_ylim(10 ** math.floor(math.log10(lowest)), 10 ** math.ceil(math.log10(highest)))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("tensor, by its place")
    axes.set_ylabel("relative L2")
    axes.figure.legend(loc="outside lower center", ncols=2)


def _limit(report: ParityReport) -> float:
    """Limit of the layers in multiples of their noise; 0 if the report does not hold it."""
    checks = [check for link in report.links for check in link.checks if check.name == "layers"]
    judged = [
        q.limit for check in checks for q in check.quantities if q.tolerance in ("replay_multiple", "half_multiple")
    ]
    if judged:
        return judged[-1]
    usual = report.tolerances.get("replay_multiple")
    return report.overrides.get("replay_multiple", usual.value if usual else 0.0)


def _drawable(value: float, lowest: float) -> float:
    """Value on a logarithmic axis: zero at the bottom, a gap if not finite."""
    return max(value, lowest) if math.isfinite(value) else math.nan


def _worst(axes: Axes, report: ParityReport) -> None:
    values = [worst.relative_l2 if math.isfinite(worst.relative_l2) else 0.0 for worst in report.worst_inputs]
    axes.barh(range(len(values)), values, 0.7, color=_GOOD)
    for row, worst in enumerate(report.worst_inputs):
        axes.annotate(
            f"{worst.relative_l2:.1e}", (values[row], row), xytext=(3, 0), textcoords="offset points", va="center",
            size=8,
        )  # fmt: skip
    axes.margins(x=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}" if value else "0")
    axes.set_xlabel("relative L2")
    _name_rows(axes, [f"{worst.sample} [{worst.index}]" for worst in report.worst_inputs])


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Label the rows with names, the first at the top."""
    axes.set_yticks(range(len(names)), _shortened([visible(" ".join(name.split())) for name in names]))
    axes.set_ylim(len(names) - 0.5, -0.5)


def _shortened(names: list[str]) -> list[str]:
    """Shorten names to fit beside a picture: drop parts that all share, then the middle."""
    if max(map(len, names)) > _LONGEST_NAME and len(names) > 1:
        parts = [name.split(".") for name in names]
        shortest = min(map(len, parts)) - 1  # at least one part is left of each name
        head = next((k for k in range(shortest) if len({tuple(p[: k + 1]) for p in parts}) > 1), shortest)
        most = shortest - head
        tail = next((k for k in range(most) if len({tuple(p[-k - 1 :]) for p in parts}) > 1), most)
        names = [".".join(p[head : len(p) - tail]) for p in parts]
    return [name if len(name) <= _LONGEST_NAME else f"{name[:8]}...{name[11 - _LONGEST_NAME :]}" for name in names]


def _plans(axes: Axes, report: ParityReport) -> None:
    for plan in report.plans:
        if plan.bytes_moved is None:
            continue
        sums = [0.0, *accumulate((moved or 0) / 1e6 for moved in plan.kernels)]
        colour = _FAINT if plan.baseline else _GOOD
        axes.plot(range(len(sums)), sums, "-", lw=1, color=colour, label=f"{visible(plan.name)}, {plan}")
        for index in plan.srus:
            axes.plot([index, index + 1], sums[index : index + 2], "-", lw=3, color=colour)
    axes.set_xlim(0, None)
    axes.set_ylim(0, None)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_xlabel("kernels")
    axes.set_ylabel("MB")
    axes.figure.legend(loc="outside lower center", ncols=1)


def _svg(name: str, rows: int, draw: Callable[[Axes], None]) -> str:
    with matplotlib.rc_context({**_SETTINGS, "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has the glyph
        figure = Figure(figsize=(_WIDTH_IN, 1.0 + _ROW_IN * max(rows, 3)))
        draw(figure.subplots())
        stream = io.StringIO()
        unwanted = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # so that equal reports are equal files
        figure.savefig(stream, format="svg", transparent=True, metadata=unwanted)
    return _inline(stream.getvalue(), name)


def _inline(document: str, name: str) -> str:
    """Convert an SVG document to an inline element: no prolog, no fixed size, ids with the picture's prefix."""
    svg = document[document.index("<svg") :]
    opening, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', opening)
    rest = re.sub(r' id="', f' id="{name}-', rest)
    rest = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", rest)
    rest = rest.replace(_INK, "currentColor").replace("xlink:href", "href")
    return f'<svg {box[0] if box else ""} role="img">{rest}'.strip()
