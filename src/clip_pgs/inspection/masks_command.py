"""`python -m clip_pgs.inspection masks IMAGE... -o OUT.png`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from PIL import Image

from clip_pgs.common import atomic_file, check_writable
from clip_pgs.inspection.images import image_endings, list_images
from clip_pgs.inspection.masks import draw_masks
from clip_pgs.inspection.strategies import create_strategies
from clip_pgs.inspection.view_options import MASKING_HELP, add_view_options, read_view


def add_masks_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "masks",
        help="draw what each strategy keeps of some images",
        description="Draw images and, beside them, what each strategy keeps; masked patches are "
        "grey, and the measured mask ratio stands below. cluster is fitted to these images.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_masks)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add("-o", "--output", required=True, metavar="OUT.png")
    add(
        "--masking",
        "--maskings",
        nargs="+",
        default=["random", "pgs"],
        metavar="NAME",
        help=f"{MASKING_HELP} (default: random pgs)",
    )
    add("--mask-ratio", type=float, metavar="F", help="share of patches dropped, in [0, 1)")
    add("--mask-ratio-min", type=float, metavar="F", help="lower bound of an adaptive count")
    add(
        "--stages",
        action="store_true",
        help="draw the steps of pgs before its column: edges, candidates, plan, score",
    )
    add("--seed", type=int, default=0, help="of the random draw (default: 0)")
    add_view_options(parser)


def run_masks(args: argparse.Namespace) -> None:
    """Draw the figure and say where it is.

    Raises:
        ValueError: If an option or an image is wrong, or the figure cannot be written.
    """
    output = Path(args.output)
    if output.suffix.lower() not in image_endings() | {".pdf"}:
        raise ValueError(f"the output must end in .png, .jpg or the like, got {output.name}")
    if not -(2**63) <= args.seed < 2**64:
        raise ValueError(f"--seed must be in [-2**63, 2**64), got {args.seed}")
    check_writable(output)
    strategies = create_strategies(
        args.masking, mask_ratio=args.mask_ratio, mask_ratio_min=args.mask_ratio_min
    )
    view = read_view(args, strategies.values())
    paths = list_images(args.images)
    if output.resolve() in (path.resolve() for path in paths):
        raise ValueError(f"the output {output} is one of the images")
    figure = draw_masks(
        paths,
        strategies,
        model_input=view.model_input,
        model=view.model,
        progress=view.progress,
        stages=args.stages,
        names=[path.stem for path in paths],
        seed=args.seed,
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as file:
            figure.save(file, Image.registered_extensions()[output.suffix.lower()])
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error}") from error
    sys.stdout.write(f"{output}\n")
