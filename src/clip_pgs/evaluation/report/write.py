"""Write a report: Markdown, HTML, a table, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from clip_pgs.evaluation.report.content import make_report
from clip_pgs.evaluation.report.figures import Figure, is_own_figure
from clip_pgs.evaluation.report.gather import gather_runs
from clip_pgs.evaluation.report.html_page import write_html
from clip_pgs.evaluation.report.markdown import write_markdown
from clip_pgs.evaluation.report.table_file import write_table
from clip_pgs.evaluation.results import CSV_NAME

MARKDOWN_NAME, HTML_NAME, FIGURES_NAME = "report.md", "report.html", "figures"


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
        ValueError: If there are no results, one cannot be read, or `output` is a file.
    """
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output {folder} is not a folder")
    if not results:
        raise ValueError("a report needs results, got none")
    report = make_report(gather_runs(results))
    (folder / FIGURES_NAME).mkdir(parents=True, exist_ok=True)
    _write_figures(report.figures, folder / FIGURES_NAME)
    (folder / CSV_NAME).write_text(write_table(report), encoding="utf-8")
    (folder / MARKDOWN_NAME).write_text(write_markdown(report), encoding="utf-8")
    (folder / HTML_NAME).write_text(write_html(report), encoding="utf-8")
    return folder


def _write_figures(figures: Sequence[Figure], folder: Path) -> None:
    """Write figures, and remove those of an earlier report."""
    files = {f"{figure.name}.svg": figure.svg for figure in figures}
    files |= {f"{figure.name}.png": figure.png for figure in figures}
    for path in folder.iterdir():
        if path.name not in files and is_own_figure(path):
            path.unlink()
    for name, content in files.items():
        (folder / name).write_bytes(content)
