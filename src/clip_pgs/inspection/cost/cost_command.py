"""`python -m clip_pgs.inspection cost`."""

from __future__ import annotations

import argparse
from pathlib import Path

from clip_pgs.inspection.cost.model_options import add_model_options
from clip_pgs.inspection.cost.random_data import LENGTHS
from clip_pgs.inspection.view_options import MASKING_HELP

FILE_NAMES = ("cost.json", "cost.png")

_DEFAULT_MASKINGS = ("none", "random", "pgs", "pgs:mask_ratio_min=0.3")


def add_cost_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "cost",
        help="measure what a training step costs with each strategy",
        description="Time training steps on random data: plain CLIP as OpenCLIP runs it, with the "
        "whole context of text tokens, and each strategy with trimmed captions. In every round "
        "each takes one step, and ratios are medians over rounds.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=_run)
    add_model_options(parser)
    add = parser.add_argument
    add("--batch-size", type=int, metavar="B", help="default: 16 on a CPU, 256 on a GPU")
    add("--steps", type=int, metavar="N", help="rounds that count (default: 5 on a CPU, else 20)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and data (default: 0)")
    add(
        "--maskings",
        "--masking",
        nargs="+",
        default=list(_DEFAULT_MASKINGS),
        metavar="NAME",
        help=f"{MASKING_HELP} (default: {' '.join(_DEFAULT_MASKINGS)})",
    )
    add("--mask-ratio", type=float, default=0.5, metavar="F", help="in [0, 1) (default: 0.5)")
    add(
        "--progress",
        type=float,
        default=0.0,
        metavar="T",
        help="share of training that strategies are told; above 0 some look at embeddings as well "
        "(default: 0)",
    )
    add(
        "--captions",
        choices=list(LENGTHS),
        default="flickr8k",
        help="whose lengths captions have (default: flickr8k)",
    )
    add("--no-trimming", action="store_true", help="give every model the whole context of tokens")
    add(
        "--pack-tokens",
        action=argparse.BooleanOptionalAction,
        help="whether maskings that keep different counts run as one sequence, as "
        "`apply_masking` has it (default: where training does)",
    )
    add("--compile", action="store_true", help="run the models through torch.compile")
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"folder for {', '.join(FILE_NAMES)}; made if it does not exist",
    )


def _run(args: argparse.Namespace) -> None:
    # open_clip takes seconds to import, which other commands need not wait for.
    from clip_pgs.inspection.cost.run import run_cost

    run_cost(args)
