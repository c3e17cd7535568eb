"""Reports: `clip-pgs test report RESULTS... -o report/`, from results to files."""

from __future__ import annotations

import argparse
import base64
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from clip_pgs.common import SentenceParser, output_path, refuse
from clip_pgs.evaluation.report import results_table, scores
from clip_pgs.evaluation.report.gather import Model, Run, gather_runs, group_by_seed
from clip_pgs.evaluation.report.published import Paper, read_paper
from clip_pgs.evaluation.report.scores import AXES, Axis, Entry, Family
from clip_pgs.evaluation.results import CSV_NAME, DONE, is_table
from clip_pgs.files import folder_lock, write_text
from clip_pgs.tables import counted, markdown_text, percent, plain

MARKDOWN_NAME, HTML_NAME, FIGURES_NAME = "report.md", "report.html", "figures"
EXIT_DONE = 0

_TITLE = "CLIP-PGS evaluation report"
# What is in the first bytes of each file of a report, also of earlier versions.
_MARKS = {
    MARKDOWN_NAME: f"# {_TITLE}",
    HTML_NAME: f"<title>{_TITLE}",
    CSV_NAME: ",".join(results_table.CSV_COLUMNS[:5]),
}
_HEAD_BYTES = 1000

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
        The exit code: 0, or after one sentence on stderr 2 on bad input, 1 on a full disk.
    """
    args = make_parser().parse_args(argv)
    try:
        folder = write_report(args.results, args.output)
    except (ValueError, OSError) as error:
        return refuse(error)
    sys.stdout.write(f"{folder / HTML_NAME}\n")
    return EXIT_DONE


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    layout = argparse.RawDescriptionHelpFormatter
    name = "clip-pgs test report"
    parser = SentenceParser(prog=name, description=_DESCRIPTION, formatter_class=layout)
    help_text = "run folders, folders of results, or result files (JSON, results.csv)"
    parser.add_argument("results", nargs="+", metavar="RESULTS", help=help_text)
    help_text = "where it goes (default: report)"
    parser.add_argument(
        "-o", "--output", type=output_path, default="report", metavar="DIR", help=help_text
    )
    return parser


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
        ValueError: If there are no results, one cannot be read, `output` is a file, the folder of
            an evaluation or one with another file of a report's name, or a package is missing that
            draws or writes.
        OSError: If a file cannot be written.
    """
    try:
        from clip_pgs import plots
        from clip_pgs.evaluation.report import figures

        templates = page_templates("clip_pgs.evaluation.report")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the report needs the package {error.name}; install clip-pgs with its extra 'eval'"
        ) from error
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"the output {folder} is not a folder")
    if not results:
        raise ValueError("a report needs results, got none")
    if is_table(folder / CSV_NAME):
        raise ValueError(
            f"the output {folder} holds an evaluation, whose {CSV_NAME} the report's would "
            "replace; name another folder"
        )
    for name, mark in _MARKS.items():
        if (folder / name).exists() and not _has_mark(folder / name, mark):
            raise ValueError(
                f"{folder / name} is not of an earlier report, and this one would replace it; name "
                "another folder"
            )

    runs, paper = gather_runs(results), read_paper()
    models = group_by_seed(runs)
    families = scores.make_families(models, paper)
    overview = figures.overview_figures(models, families, paper)
    suites = scores.ordered_suites(suite for family in families for suite in family.suites)
    sections: list[dict[str, Any]] = [
        {
            "title": _title(suite, family, families),
            "table": results_table.family_table(suite, family, paper),
            "figure": figures.suite_figure(suite, family),
        }
        for suite in suites
        for family in families
        if suite in family.suites
    ]
    drawn = [*overview, *(section["figure"] for section in sections)]
    beside = {suite for family in families if family.is_paper for suite in family.suites}
    content = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "summary": _summary(models, families, paper),
        "cards": [
            _card(model, entry, family)
            for model in models
            for family in families
            if (entry := family.entry(model.name)) is not None and entry.scores
        ],
        "overview": overview,
        "masks": [(run.name, run.masks) for run in _whole_runs(models) if run.masks],
        "trouble": results_table.trouble_table(runs),
        "models": results_table.models_table(models),
        "sections": sections,
        "reference_title": f"Published, for reference: {paper.training}",
        "reference": results_table.reference_tables(paper, without=beside),
        "details": results_table.details_tables(runs),
        "provenance": results_table.provenance_table(runs),
    }
    names = (MARKDOWN_NAME, HTML_NAME)
    markdown, page = (templates.get_template(f"{n}.jinja").render(report=content) for n in names)

    folder.mkdir(parents=True, exist_ok=True)
    # Evaluations that end at one time report one after the other.
    with folder_lock(folder, on_busy=lambda: None):
        plots.write_figures(drawn, folder / FIGURES_NAME, mark=figures.MARK)
        write_text(folder / CSV_NAME, results_table.scores_csv(models, families, paper))
        write_text(folder / MARKDOWN_NAME, re.sub(r"\n{3,}", "\n\n", markdown).rstrip() + "\n")
        write_text(folder / HTML_NAME, page)
    return folder


def _has_mark(path: Path, mark: str) -> bool:
    """Return whether a file is one of a report's, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return mark.encode() in file.read(_HEAD_BYTES)


def page_templates(*packages: str) -> Any:
    """Return the templates of packages, with what all pages share: style, figures, filters.

    Raises:
        ModuleNotFoundError: If jinja2 is not installed.
    """
    import jinja2

    templates = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in packages]),
        autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    templates.filters.update(
        plain=plain,
        md=markdown_text,
        base64=lambda data: base64.b64encode(data).decode("ascii"),
    )
    return templates


def _whole_runs(models: Sequence[Model]) -> list[Run]:
    """Return the first run of each model, once where it was evaluated through several masks."""
    first = {model.runs[0].weights_digest: model.runs[0] for model in reversed(models)}
    return [*first.values()][::-1]


def _title(suite: str, family: Family, families: Sequence[Family]) -> str:
    title = scores.suite_of(suite).title
    if family.is_paper:
        return f"{title}, the paper's data sets"
    return f"{title}, other data sets" if len(families) > 1 else title


def _card(model: Model, entry: Entry, family: Family) -> dict[str, Any]:
    """Return the summary of a model on one family of data sets: what it is, and three numbers."""
    parts = [model.training.architecture, entry.facts, entry.more]
    return {
        "name": model.name,
        "sentence": f"{', '.join(part for part in parts if part)}; scored on {family.words}.",
        "headlines": [_headline(entry, axis, family) for axis in AXES],
    }


def _headline(entry: Entry, axis: Axis, family: Family) -> dict[str, str]:
    """Return a number of a summary: what it is over, and how others do on the same sets."""
    score = axis.score(entry)
    if score is None:
        return {"title": axis.title, "value": "", "standing": "not measured"}
    members = results_table.num_members(axis.place, family.entries)
    lacking = f"{len(score.sets)} of " if len(score.sets) < members else ""
    others = [
        f"{other.name} {percent(mean)}"
        for other in family.entries
        if other.name in scores.COMPARED and other.kind != scores.RUN
        if (mean := axis.mean_over(other, score.sets)) is not None
    ]
    over = f"over {lacking}{counted(members, 'set')}"
    return {
        "title": axis.title,
        "value": percent(score.mean),
        "spread": results_table.spread_text(score.spread),
        "standing": "; ".join(filter(None, [over, ", ".join(others)])),
    }


def _summary(models: Sequence[Model], families: Sequence[Family], paper: Paper) -> str:
    runs = [run for model in models for run in model.runs]
    results = [result for run in runs for result in run.results]
    sets = {(result.suite, result.dataset) for result in results}
    suites = counted(len({suite for suite, _ in sets}), "suite")
    # One model seen through several masks, or none, is as many rows.
    alike: list[frozenset[str]] = []
    for model in models:
        weights = frozenset(run.weights_digest for run in model.runs)
        weights = weights.union(*(others for others in alike if others & weights))
        alike = [*(others for others in alike if not others & weights), weights]
    num_runs = sum(map(len, alike))
    told = [counted(num_runs, "run")] if num_runs > len(alike) else []
    told += [f"{len(models)} rows, a mask a row"] if len(models) > len(alike) else []
    about_rows = f" ({'; '.join(told)})" if told else ""
    models_text, sets_text = counted(len(alike), "model"), counted(len(sets), "data set")
    parts = [f"{models_text}{about_rows} on {sets_text} of {suites}"]
    num_undone = sum(result.status != DONE for result in results)
    if num_undone:
        parts.append(f"{counted(num_undone, 'result')} missing or failed")
    about = "none of the sets is the paper's, whose figures stand here for reference alone"
    if any(family.is_paper for family in families):
        about = f"published rows were trained on {paper.training}"
    return "; ".join([*parts, about]) + "."
