"""Command line: `python -m clip_pgs.evaluation report RESULTS... -o report/`."""

from __future__ import annotations

import argparse
import base64
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from clip_pgs.common import SentenceParser, one_sentence, write_text
from clip_pgs.evaluation.results import CSV_NAME

MARKDOWN_NAME, HTML_NAME, FIGURES_NAME = "report.md", "report.html", "figures"
EXIT_DONE, EXIT_BAD_INPUT = 0, 2

_DESCRIPTION = """\
Report where models stand: report.html (one file that opens without a network), report.md,
results.csv and figures/. Published figures of the CLIP-PGS paper stand beside results on its data
sets; runs that differ only in their seed become one row with mean and spread.
"""


def run(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: Arguments after `report`.

    Returns:
        The exit code: 0, or 2 on bad input, after one sentence on stderr.
    """
    parser = SentenceParser(
        prog="python -m clip_pgs.evaluation report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "results",
        nargs="+",
        metavar="RESULTS",
        help="run folders, folders of results, or result files (JSON, results.csv)",
    )
    parser.add_argument(
        "-o", "--output", default="report", metavar="DIR", help="where it goes (default: report)"
    )
    args = parser.parse_args(argv)
    try:
        folder = write_report(args.results, args.output)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {one_sentence(error)}\n")
        return EXIT_BAD_INPUT
    sys.stdout.write(f"{folder / HTML_NAME}\n")
    return EXIT_DONE


def write_report(results: Sequence[str | Path], output: str | Path = "report") -> Path:
    """Report where models stand, beside the published figures and beside each other.

    Args:
        results: Run folders, folders of results, result files or their tables; see
            `gather_runs`.
        output: Folder for `report.html` (one file that needs nothing else), `report.md`,
            `results.csv` and `figures/`; made if need be. Files of an earlier report are replaced,
            and figures that this one does not show are removed; no other file is.

    Returns:
        The folder.

    Raises:
        ValueError: If there are no results, one cannot be read, `output` is a file, or a package
            is missing that draws or writes.
    """
    try:
        import jinja2

        from clip_pgs.evaluation.report.content import make_report
        from clip_pgs.evaluation.report.figures import is_own_figure
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the report needs the package {error.name}; install clip-pgs with its extra 'eval'"
        ) from error
    from clip_pgs.evaluation.report.gather import gather_runs
    from clip_pgs.tables import markdown_text, plain

    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output {folder} is not a folder")
    if not results:
        raise ValueError("a report needs results, got none")
    report = make_report(gather_runs(results))
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("clip_pgs.evaluation.report", "templates"),
        autoescape=lambda name: name is not None and name.startswith(HTML_NAME),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    templates.filters.update(
        plain=plain,
        md=markdown_text,
        anchor=lambda text: re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-"),
        base64=lambda data: base64.b64encode(data).decode("ascii"),
    )
    markdown, page = (
        templates.get_template(f"{name}.jinja").render(report=report)
        for name in (MARKDOWN_NAME, HTML_NAME)
    )
    (folder / FIGURES_NAME).mkdir(parents=True, exist_ok=True)
    files = {f"{figure.name}.svg": figure.svg for figure in report.figures}
    files |= {f"{figure.name}.png": figure.png for figure in report.figures}
    for path in (folder / FIGURES_NAME).iterdir():
        if path.name not in files and is_own_figure(path):
            path.unlink()
    for name, content in files.items():
        (folder / FIGURES_NAME / name).write_bytes(content)
    write_text(folder / CSV_NAME, report.scores)
    write_text(folder / MARKDOWN_NAME, re.sub(r"\n{3,}", "\n\n", markdown).rstrip() + "\n")
    write_text(folder / HTML_NAME, page)
    return folder
