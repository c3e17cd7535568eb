"""The flags of the evaluation command, and where its results go."""

from __future__ import annotations

import argparse
from pathlib import Path

from clip_pgs.common import SentenceParser
from clip_pgs.evaluation.datasets.datasets import clean_name
from clip_pgs.evaluation.datasets.suites import SUITES
from clip_pgs.evaluation.models.models import check_source, model_name
from clip_pgs.evaluation.run_places import EVAL_NAME

_EPILOG = """\
clip-test.sh sets --help     which data sets are there, and how to get the others
clip-test.sh report --help   a report on results, beside the published numbers

exit codes: 0 all data sets done, 1 some missing or failed, 2 bad input, 130 interrupted

data sets are folders in clip_benchmark's webdataset layout. A line NAME of a list, without its
`wds/`, is the folder NAME, or NAME with `-` for `/`, or the same after `wds_`, below --data-root;
`sugar_crepe/SPLIT` is SPLIT.json and val2017/ in the folder sugar_crepe. A line `SUITE: NAME` is
for that suite alone; --suite all gives linear-probe and robustness no other lines of your list.

what is done is kept and not redone: the same command continues after an interruption.
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = SentenceParser(
        prog="clip-test.sh",
        description="Evaluate CLIP models in five suites.",
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
    add_data_flags(parser)
    add("--output", metavar="DIR", help="default: RUN/eval for a run, else eval_results/MODEL")
    add("--force", action="store_true", help="redo what is done")
    add(
        "--no-report",
        dest="report",
        action="store_false",
        help="leave out the report, which goes to the output's report/ (several models: to "
        "eval_results/report)",
    )
    add("--batch-size", type=int, default=64, help="images per step (default: 64)")
    add("--workers", type=int, help="processes that read images (default: up to 4)")
    add("--device", help="default: cuda if there is one, else cpu")
    # torchrun makes 1 of every exit code but 0.
    add("--exit-code-file", help=argparse.SUPPRESS)
    return parser


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose data sets.

    Args:
        parser: Of a command that gives them to `load_suite`.
    """
    parser.add_argument("--suite", default="all", help=f"{', '.join(SUITES)} or all (default: all)")
    parser.add_argument(
        "--datasets",
        default="demo",
        metavar="demo|paper|FILE",
        help="a list of configs/eval, or your own: a data set per line (default: demo)",
    )
    parser.add_argument(
        "--data-root",
        metavar="DIR",
        help="where the data sets are: a folder, a template with {dataset_cleaned}, or hub "
        "(default: data/demo/eval for demo, data/eval for paper, else the working directory)",
    )


def output_folders(args: argparse.Namespace) -> dict[str, Path]:
    """Return where the results of each source go, after checking that the source is one.

    Args:
        args: Of `make_parser`.

    Raises:
        ValueError: If a source cannot be opened, or two would write to one folder.
    """
    folders: dict[str, Path] = {}
    for source in args.sources:
        check_source(
            source, model=args.model, model_config=args.model_config, pretrained=args.pretrained
        )
        name = clean_name(model_name(source, pretrained=args.pretrained))
        if args.output is not None:
            folder = Path(args.output, name) if len(args.sources) > 1 else Path(args.output)
        elif Path(source, "export").is_dir():
            folder = Path(source, EVAL_NAME)
        else:
            folder = Path("eval_results", name)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"the output {folder} is not a folder")
        if folder in folders.values():
            raise ValueError(f"two models would write to {folder}; evaluate them apart")
        folders[source] = folder
    return folders
