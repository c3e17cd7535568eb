"""Command line: `python -m clip_pgs.evaluation RUN_OR_CHECKPOINT...`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from clip_pgs.evaluation.benchmark import check_installation
from clip_pgs.evaluation.datasets import EvalSet, clean_name
from clip_pgs.evaluation.models import check_source, load_model, model_name
from clip_pgs.evaluation.results import CSV_NAME, DONE, MISSING, Result
from clip_pgs.evaluation.runner import ERRORS_NAME, evaluate
from clip_pgs.evaluation.suites import SUITES, load_suite
from clip_pgs.evaluation.table import format_table

# Run as a module, this file is "__main__", outside the package that logs.
logger = logging.getLogger("clip_pgs.evaluation")

EXIT_DONE, EXIT_INCOMPLETE, EXIT_BAD_INPUT = 0, 1, 2

_HINTS = {
    "demo": "make the demo data with `python -m clip_pgs.data world data/demo`",
    "paper": "read the data from the hub with `--data-root hub`, or name a folder of them",
}
_EPILOG = """\
exit codes: 0 all data sets done, 1 some missing or failed, 2 bad input (nothing is written)

data sets are folders in clip_benchmark's webdataset layout. A line NAME of a list, without its
`wds/`, is the folder NAME, or NAME with `-` for `/`, or the same after `wds_`, below --data-root.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit code: 0 if every data set was done, 1 if some are missing or failed, 2 on bad
        input, after one sentence on stderr.
    """
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("clip_pgs").setLevel(logging.INFO)
    try:
        check_installation()
        eval_sets = load_suite(args.suite, datasets=args.datasets, data_root=args.data_root)
        device = _device(args.device)
        _check_positive(args.batch_size, args.workers)
        outputs = _output_folders(args)
    except ValueError as error:
        return _complain(error)

    exit_code = EXIT_DONE
    for source, output in outputs.items():
        try:
            results = _evaluate_source(source, eval_sets, output, device, args)
        except ValueError as error:
            exit_code = _complain(error)
            continue
        if any(result.status != DONE for result in results):
            exit_code = max(exit_code, EXIT_INCOMPLETE)
        is_missing = any(result.status == MISSING for result in results)
        if is_missing and args.data_root is None and args.datasets in _HINTS:
            logger.info("Some data sets are missing: %s", _HINTS[args.datasets])
    return exit_code


def _evaluate_source(
    source: str, eval_sets: list[EvalSet], output: Path, device: str, args: argparse.Namespace
) -> list[Result]:
    loaded = load_model(source, device=device, **_model_options(args))
    logger.info("Evaluating %s on %s", loaded.source, device)
    results = evaluate(
        loaded, eval_sets, output=output, batch_size=args.batch_size, workers=args.workers
    )
    sys.stdout.write(f"\n{loaded.name} ({loaded.source})\n\n{format_table(results)}\n")
    sys.stdout.write(f"In percent; files are in {output}, the table as {CSV_NAME}\n")
    if any(result.status not in (DONE, MISSING) for result in results):
        sys.stdout.write(f"What failed is told in full in {output / ERRORS_NAME}\n")
    sys.stdout.flush()
    return results


def _output_folders(args: argparse.Namespace) -> dict[str, Path]:
    """Return where the results of each source go, after checking that the source is one."""
    folders: dict[str, Path] = {}
    for source in args.sources:
        check_source(source, **_model_options(args))
        name = clean_name(model_name(source, pretrained=args.pretrained))
        if args.output is not None:
            folder = Path(args.output, name) if len(args.sources) > 1 else Path(args.output)
        elif Path(source, "export").is_dir():
            folder = Path(source, "eval")
        else:
            folder = Path("eval_results", name)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"the output {folder} is not a folder")
        if folder in folders.values():
            raise ValueError(f"two models would write to {folder}; evaluate them apart")
        folders[source] = folder
    return folders


def _model_options(args: argparse.Namespace) -> dict[str, str | None]:
    return {
        "model": args.model,
        "model_config": args.model_config,
        "pretrained": args.pretrained,
    }


def _device(name: str | None) -> str:
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    # torch raises either, or an AssertionError where it was built without the backend.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here") from error
    return name


def _check_positive(batch_size: int, workers: int | None) -> None:
    if batch_size < 1:
        raise ValueError(f"--batch-size must be >= 1, got {batch_size}")
    if workers is not None and workers < 0:
        raise ValueError(f"--workers must be >= 0, got {workers}")


def _complain(error: ValueError) -> int:
    sys.stderr.write(f"error: {error}\n")
    return EXIT_BAD_INPUT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="clip-test.sh",
        description="Evaluate CLIP models with clip_benchmark.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "sources",
        nargs="+",
        metavar="RUN_OR_CHECKPOINT",
        help="a run folder, an export, a checkpoint file, hf-hub:OWNER/NAME or an open_clip model",
    )
    add("--model", metavar="NAME", help="architecture of a checkpoint, if no run tells it")
    add("--model-config", metavar="FILE", help="the same, as an OpenCLIP model config (JSON)")
    add("--pretrained", metavar="TAG", help="published weights of an open_clip model")
    add("--suite", default="all", help=f"{', '.join(SUITES)} or all (default: all)")
    add(
        "--datasets",
        default="demo",
        metavar="demo|paper|FILE",
        help="a list of configs/eval, or your own: a data set per line (default: demo)",
    )
    add(
        "--data-root",
        metavar="DIR",
        help="where the data sets are: a folder, a template with {dataset_cleaned}, or hub "
        "(default: data/demo/eval for demo, data/eval for paper, else the working directory)",
    )
    add("--output", metavar="DIR", help="default: RUN/eval for a run, else eval_results/MODEL")
    add("--batch-size", type=int, default=64, help="images per step (default: 64)")
    add("--workers", type=int, help="processes that read images (default: up to 4)")
    add("--device", help="default: cuda if there is one, else cpu")
    return parser


if __name__ == "__main__":
    sys.exit(main())
