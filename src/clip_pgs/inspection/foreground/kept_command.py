"""`python -m clip_pgs.inspection kept IMAGE... --foreground MASKS`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_pgs.common import check_writable
from clip_pgs.inspection.foreground.annotations import ForegroundImages, pair_masks, read_foreground
from clip_pgs.inspection.foreground.kept import NUM_SEEDS, measure_kept, num_steps
from clip_pgs.inspection.foreground.kept_plot import plot_kept
from clip_pgs.inspection.foreground.kept_report import FILE_NAMES, kept_table, write_kept
from clip_pgs.inspection.strategies import parse_specs
from clip_pgs.inspection.view import View
from clip_pgs.inspection.view_options import MASKING_HELP, add_view_options, read_view
from clip_pgs.masking.strategy import check_mask_ratio

MAX_SEEDS = 10_000


def add_kept_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "kept",
        help="measure how much of the foreground each strategy keeps",
        description="Measure the share of foreground patches that strategies keep: mean over "
        "images and seeds, and standard deviation over seeds. A patch is foreground above half "
        "of its area. cluster is fitted to these images at each ratio.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_kept)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="image files, or folders of them")
    add(
        "--foreground",
        required=True,
        metavar="MASKS",
        help="folder with a mask for each image, NAME.png for NAME.jpg and of its size; any value "
        "but 0 is foreground",
    )
    add(
        "--maskings",
        "--masking",
        nargs="+",
        default=["random", "gaussian", "cluster", "pgs"],
        metavar="NAME",
        help=f"{MASKING_HELP} (default: random gaussian cluster pgs)",
    )
    add(
        "--mask-ratios",
        "--mask-ratio",
        nargs="+",
        type=float,
        default=[0.3, 0.5, 0.75],
        metavar="F",
        help="shares of patches dropped, in [0, 1) (default: 0.3 0.5 0.75)",
    )
    add(
        "--seeds",
        type=int,
        default=NUM_SEEDS,
        metavar="N",
        help=f"random draws (default: {NUM_SEEDS})",
    )
    add(
        "-o",
        "--output",
        type=Path,
        metavar="FOLDER",
        help=f"folder for {', '.join(FILE_NAMES)}; made if it does not exist",
    )
    add_view_options(parser)


def run_kept(args: argparse.Namespace) -> None:
    """Measure, print the table and write the files.

    Raises:
        ValueError: If an option, an image or a mask is wrong, or a file cannot be written.
    """
    if not 1 <= args.seeds <= MAX_SEEDS:
        raise ValueError(f"--seeds must be in [1, {MAX_SEEDS}], got {args.seeds}")
    for mask_ratio in args.mask_ratios:
        check_mask_ratio(mask_ratio)
    mask_ratios = list(dict.fromkeys(args.mask_ratios))
    specs = parse_specs(args.maskings)
    strategies = [spec.build(mask_ratio=ratio) for spec in specs for ratio in mask_ratios]
    view = read_view(args, strategies)
    pairs = pair_masks(args.images, args.foreground)
    if args.output is not None:
        check_writable(*(args.output / name for name in FILE_NAMES))

    # Both files of a pair are read for one tick, and every selection of all images is one more.
    total = len(pairs) + num_steps(specs, mask_ratios, args.seeds)
    with tqdm(total=total, leave=False, disable=not sys.stderr.isatty()) as bar:
        bar.set_description("reading")
        images = read_foreground(pairs, view.model_input, progress=bar.update)
        bar.set_description("masking")
        rows = measure_kept(
            images, specs, mask_ratios, view=view, num_seeds=args.seeds, progress=bar.update
        )
    facts = _facts(images, view, num_seeds=args.seeds)
    sys.stdout.write(f"{_describe(facts)}\n\n{kept_table(rows)}")
    if args.output is not None:
        try:
            args.output.mkdir(parents=True, exist_ok=True)
            write_kept(rows, facts, args.output)
            plot_kept(rows, args.output / "kept.png", title=_describe_short(facts))
        except OSError as error:
            raise ValueError(f"cannot write into {args.output}: {error}") from error
        sys.stdout.write(f"\n{args.output}: {', '.join(FILE_NAMES)}\n")


def _facts(images: ForegroundImages, view: View, *, num_seeds: int) -> dict[str, Any]:
    num_images, num_patches = images.foreground.shape
    return {
        "num_images": num_images,
        "num_without_foreground": images.num_without,
        "num_patches": num_patches,
        "foreground_share": images.foreground.double().mean().item(),
        "image_size": list(view.model_input.image_size),
        "patch_size": list(view.model_input.patch_size),
        "progress": view.progress,
        "num_seeds": num_seeds,
    }


def _describe(facts: dict[str, Any]) -> str:
    text = (
        "share of foreground patches kept, mean and standard deviation over seeds\n"
        f"{_describe_short(facts)}, {facts['foreground_share']:.2f} of their patches foreground"
    )
    if facts["num_without_foreground"]:
        text += f"; {facts['num_without_foreground']} without a foreground patch left out"
    return text


def _describe_short(facts: dict[str, Any]) -> str:
    (height, width), (patch_height, patch_width) = facts["image_size"], facts["patch_size"]
    return (
        f"{facts['num_images']} images of {height} x {width} pixels in patches of "
        f"{patch_height} x {patch_width}, {facts['num_seeds']} seeds"
    )
