"""Command line: `python -m clip_pgs.evaluation report RESULTS... -o report/`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clip_pgs.common import SentenceParser, one_sentence

_DESCRIPTION = """\
Report where models stand: report.html (one file that opens without a network), report.md,
results.csv and figures/. Published figures of the CLIP-PGS paper stand beside results on its data
sets; runs that differ only in their seed become one row with mean and spread.
"""
EXIT_DONE, EXIT_BAD_INPUT = 0, 2


def run(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: Arguments after `report`.

    Returns:
        The exit code: 0, or 2 on bad input, after one sentence on stderr.
    """
    args = _parser().parse_args(argv)
    try:
        # The packages that draw and write are of the extra; their absence is told in one sentence.
        from clip_pgs.evaluation.report.write import HTML_NAME, write_report

        folder = write_report(args.results, args.output)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        sys.stderr.write(f"error: {one_sentence(_reason(error))}\n")
        return EXIT_BAD_INPUT
    sys.stdout.write(f"{folder / HTML_NAME}\n")
    return EXIT_DONE


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"the report needs the package {error.name}; install clip-pgs with its extra 'eval'"
    return str(error)


def _parser() -> argparse.ArgumentParser:
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
    return parser
