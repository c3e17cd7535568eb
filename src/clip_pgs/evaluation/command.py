"""Evaluate models from the command line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from clip_pgs.common import one_sentence
from clip_pgs.evaluation.benchmark import check_installation
from clip_pgs.evaluation.command_options import make_parser, output_folders
from clip_pgs.evaluation.datasets.datasets import EvalSet
from clip_pgs.evaluation.datasets.suites import load_suite
from clip_pgs.evaluation.models.models import load_model
from clip_pgs.evaluation.ranks import Ranks, join_ranks
from clip_pgs.evaluation.results import CSV_NAME, DONE, MISSING, Result, result_files
from clip_pgs.evaluation.runner import evaluate
from clip_pgs.evaluation.score_sheet import ERRORS_NAME
from clip_pgs.evaluation.table import format_table

logger = logging.getLogger(__name__)

EXIT_DONE, EXIT_INCOMPLETE, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130
REPORT_NAME = "report"

_HINTS = {
    "demo": "make the demo data with `python -m clip_pgs.data world data/demo`",
    "paper": "`python -m clip_pgs.evaluation sets --datasets paper` tells how to get each",
}


def run(argv: Sequence[str]) -> int:
    """Evaluate models as the command line says.

    Args:
        argv: Arguments.

    Returns:
        The exit code, see `__main__`. With `--exit-code-file` it is written there, and 0 returned.
    """
    args = make_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("clip_pgs").setLevel(logging.INFO)
    with join_ranks() as ranks:
        try:
            exit_code = _run(args, ranks)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted; the same command continues\n")
            exit_code = EXIT_INTERRUPTED
    if args.exit_code_file is None:
        return exit_code
    if ranks.is_main:
        Path(args.exit_code_file).write_text(f"{exit_code}\n", encoding="utf-8")
    return 0


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    try:
        check_installation()
        eval_sets = load_suite(args.suite, datasets=args.datasets, data_root=args.data_root)
        device = _device(args.device, ranks)
        _check_numbers(args.batch_size, args.workers)
        outputs = output_folders(args)
    # OSError: a path that cannot be looked up.
    except (ValueError, OSError) as error:
        return _complain(error, ranks)

    exit_code = EXIT_DONE
    scored: list[tuple[Path, list[Result]]] = []
    for source, output in outputs.items():
        try:
            results = _evaluate_source(source, eval_sets, output, device, ranks, args)
        except ValueError as error:
            exit_code = _complain(error, ranks)
            continue
        scored.append((output, results))
        if any(result.status != DONE for result in results):
            exit_code = max(exit_code, EXIT_INCOMPLETE)
        is_missing = any(result.status == MISSING for result in results)
        if is_missing and args.data_root is None and args.datasets in _HINTS:
            logger.info("Some data sets are missing: %s", _HINTS[args.datasets])
    if args.report and ranks.is_main:
        _write_report(scored, args)
    return exit_code


def _evaluate_source(
    source: str,
    eval_sets: list[EvalSet],
    output: Path,
    device: str,
    ranks: Ranks,
    args: argparse.Namespace,
) -> list[Result]:
    loaded = load_model(
        source,
        device=device,
        model=args.model,
        model_config=args.model_config,
        pretrained=args.pretrained,
    )
    if ranks.is_main:
        where = device if ranks.world_size == 1 else f"{ranks.world_size} processes"
        logger.info("Evaluating %s on %s", loaded.source, where)
    results = evaluate(
        loaded,
        eval_sets,
        output=output,
        batch_size=args.batch_size,
        workers=args.workers,
        force=args.force,
        ranks=ranks,
    )
    if ranks.is_main:
        sys.stdout.write(f"\n{loaded.name} ({loaded.source})\n\n{format_table(results)}\n")
        sys.stdout.write(f"In percent; files are in {output}, the table as {CSV_NAME}\n")
        if any(result.status not in (DONE, MISSING) for result in results):
            sys.stdout.write(f"What failed is told in full in {output / ERRORS_NAME}\n")
        sys.stdout.flush()
    return results


def _write_report(scored: Sequence[tuple[Path, list[Result]]], args: argparse.Namespace) -> None:
    """Report on all that is known of these models by now, also from earlier calls."""
    if not any(result.status == DONE for _, results in scored for result in results):
        return
    # File by file, as results of older weights may lie beside them.
    sources = [
        path
        for output, results in scored
        for path, result in result_files(output)
        if result.weights_digest == results[0].weights_digest
    ]
    if args.output is not None:
        folder = Path(args.output, REPORT_NAME)
    else:
        folder = (scored[0][0] if len(scored) == 1 else Path("eval_results")) / REPORT_NAME
    try:
        # Figures need matplotlib, which the numbers do not.
        from clip_pgs.evaluation.report.write import HTML_NAME, write_report

        written = write_report(sources, folder)
    except (ValueError, ModuleNotFoundError) as error:
        logger.warning("there is no report: %s", error)
        return
    sys.stdout.write(f"The report is {written / HTML_NAME}\n")


def _device(name: str | None, ranks: Ranks) -> str:
    if name is None:
        if not torch.cuda.is_available():
            return "cpu"
        return "cuda" if ranks.world_size == 1 else f"cuda:{ranks.local_rank}"
    try:
        torch.empty(0, device=name)
    # torch raises either, or an AssertionError where it was built without the backend.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here") from error
    return name


def _check_numbers(batch_size: int, workers: int | None) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch-size must be >= 1, got {batch_size}")
    if workers is not None and workers < 0:
        raise ValueError(f"--workers must be >= 0, got {workers}")


def _complain(error: Exception, ranks: Ranks) -> int:
    if ranks.is_main:
        sys.stderr.write(f"error: {one_sentence(error)}\n")
    return EXIT_BAD_INPUT
