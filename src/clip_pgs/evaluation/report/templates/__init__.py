"""The texts around the numbers, as Jinja templates."""

from __future__ import annotations

import jinja2

__all__ = ["environment"]


def environment(*, autoescape: bool) -> jinja2.Environment:
    """Return an environment that reads this folder; a name that is not defined is an error.

    Args:
        autoescape: Whether values are escaped for HTML.
    """
    return jinja2.Environment(
        loader=jinja2.PackageLoader("clip_pgs.evaluation.report", "templates"),
        autoescape=autoescape,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=False,
    )
