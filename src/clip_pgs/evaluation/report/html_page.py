"""The report as one HTML file that loads nothing: styles and figures are inside."""

from __future__ import annotations

import base64
import re

from clip_pgs.evaluation.report.content import Report
from clip_pgs.evaluation.report.figures import Figure
from clip_pgs.evaluation.report.templates import environment


def write_html(report: Report) -> str:
    """Return a report as one HTML document."""
    templates = environment(autoescape=True)
    templates.filters.update(data_address=data_address, anchor=anchor)
    return templates.get_template("report.html.jinja").render(report=report)


def data_address(figure: Figure) -> str:
    """Return a figure as an address that holds it."""
    return f"data:image/svg+xml;base64,{base64.b64encode(figure.svg).decode('ascii')}"


def anchor(text: str) -> str:
    """Return text as a name that links can point to."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
