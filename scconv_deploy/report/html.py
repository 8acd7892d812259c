"""HTML report in one file, without network access or scripts."""

from __future__ import annotations

import functools
import math
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from scconv_deploy.records.parity import ParityReport
from scconv_deploy.records.sensitivity import Sensitivity
from scconv_deploy.report.engine_facts import engine_facts, plan_facts
from scconv_deploy.report.escaping import visible
from scconv_deploy.report.explained import STEPS, TERMS, meanings_of
from scconv_deploy.report.pictures import pictures, sensitivity_picture
from scconv_deploy.report.sensitivity import decibels, percent


@functools.cache
def environment() -> Environment:
    """Templates of the pages: every value is escaped, and an unknown name is an error."""
    made = Environment(
        loader=PackageLoader("scconv_deploy.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_finalize,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {"scientific": _scientific, "percent": _percent, "count": _count, "plain": _plain}
    made.filters |= {"decibels": decibels, "share": percent}
    return made


def html_page(report: ParityReport) -> str:
    """Render a report as an HTML page: verdict and reason first, then the measurements."""
    # safe as markup: matplotlib escapes the names in the pictures
    drawn = {name: (picture, Markup(picture.svg)) for name, picture in pictures(report).items()}
    deciding = {q.tolerance for link in report.links for check in link.checks for q in check.quantities}
    return environment().get_template("report.html.j2").render(
        report=report, pictures=drawn, engine_facts=engine_facts, plan_facts=plan_facts(report),
        meanings=meanings_of(report), terms=TERMS,
        steps=STEPS, deciding=deciding | set(report.overrides),
    )  # fmt: skip


def sensitivity_page(result: Sensitivity) -> str:
    """Render the costs of int8 sites as an HTML page."""
    picture = sensitivity_picture(result)
    drawn = {"sensitivity": (picture, Markup(picture.svg))}  # safe as above
    return environment().get_template("sensitivity.html.j2").render(result=result, pictures=drawn)


def _plain(text: str) -> str:
    """Remove Markdown's marks from our own text."""
    return text.replace("`", "").replace("*", "")


def _finalize(value: Any) -> Any:
    if value is None:
        return ""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _scientific(value: float | None) -> str:
    """Format an error with two digits."""
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.1e}"


def _percent(value: float | None, digits: int = 0) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}%}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
