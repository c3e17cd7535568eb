"""Command line: `python -m clip_pgs.inspection masks IMAGE... -o OUT.png`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from clip_pgs.inspection.masks import create_strategies, draw_masks
from clip_pgs.inspection.model_input import ModelInput, read_model_input
from clip_pgs.masking import list_maskings


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit code: 0, or 2 on bad input, after one sentence on stderr.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def _run_masks(args: argparse.Namespace) -> None:
    output = Path(args.output)
    if output.suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"the output must end in .png, .jpg or the like, got {output.name}")
    strategies = create_strategies(
        args.masking, mask_ratio=args.mask_ratio, mask_ratio_min=args.mask_ratio_min
    )
    model_input = ModelInput() if args.model is None else read_model_input(args.model)
    sizes = {"image_size": args.image_size, "patch_size": args.patch_size}
    given: dict[str, Any] = {name: (side, side) for name, side in sizes.items() if side is not None}
    model_input = replace(model_input, **given)

    figure = draw_masks(
        [_open_image(path) for path in args.images],
        strategies,
        model_input=model_input,
        names=[Path(path).stem for path in args.images],
        seed=args.seed,
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        figure.save(output)
    except OSError as error:
        raise ValueError(f"cannot write {output}: {error}") from error
    sys.stdout.write(f"{output}\n")


def _open_image(path: str) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"there is no image {path}") from None
    except OSError as error:
        raise ValueError(f"cannot read the image {path}: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m clip_pgs.inspection",
        description="Look at what masking strategies do.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    masks = commands.add_parser(
        "masks",
        help="draw what each strategy keeps of some images",
        description="Draw images and, beside them, what each strategy keeps; masked patches are "
        "grey, and the measured mask ratio stands below.",
        allow_abbrev=False,
    )
    masks.set_defaults(run=_run_masks)
    add = masks.add_argument
    add("images", nargs="+", metavar="IMAGE")
    add("-o", "--output", required=True, metavar="OUT.png")
    add(
        "--masking",
        nargs="+",
        default=["random", "pgs"],
        metavar="NAME",
        help=f"of {', '.join(list_maskings())} (default: random pgs)",
    )
    add("--mask-ratio", type=float, metavar="F", help="share of patches dropped, in [0, 1)")
    add("--mask-ratio-min", type=float, metavar="F", help="lower bound of an adaptive count")
    add(
        "--model",
        metavar="RUN_OR_CONFIG",
        help="take image size, patch size and normalisation from a run folder, a model config "
        "(JSON) or a model that open_clip knows",
    )
    add("--image-size", type=int, metavar="PIXELS", help="default: the model's, or 224")
    add("--patch-size", type=int, metavar="PIXELS", help="default: the model's, or 16")
    add("--seed", type=int, default=0, help="of the random draw (default: 0)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
