"""`python -m clip_pgs.inspection data PATH...`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from clip_pgs.inspection.cost.output import format_table, make_folder, write_json

FILE_NAME = "data.json"


def add_data_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "data",
        help="measure how fast JPEG files become training crops",
        description="Decode and crop JPEG files with one core, as training does and as OpenCLIP's "
        "trainer does, in turns.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_data)
    add = parser.add_argument
    add("paths", nargs="+", metavar="PATH", help="JPEG files, folders of them, or tar shards")
    add("--image-size", type=int, default=224, metavar="PIXELS", help="of a crop (default: 224)")
    add(
        "--min-side",
        type=int,
        default=0,
        metavar="PIXELS",
        help="leave out images whose longer side is shorter (default: 0)",
    )
    add("--limit", type=int, default=512, metavar="N", help="images at most (default: 512)")
    add("--steps", type=int, default=7, metavar="N", help="rounds that count (default: 7)")
    add("-o", "--output", type=Path, metavar="FOLDER", help=f"folder for {FILE_NAME}")


def run_data(args: argparse.Namespace) -> None:
    """Measure, print the table and write the file.

    Raises:
        ValueError: If an option or a path is wrong, or the file cannot be written.
    """
    # It takes seconds to import, which other commands need not wait for.
    from clip_pgs.inspection.cost.data_speed import measure_data_speed, read_jpegs

    for name in ("image_size", "limit", "steps"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, name)}")
    images = read_jpegs(args.paths, min_side=args.min_side, limit=args.limit)
    if args.output is not None:
        make_folder(args.output)
    total = 2 * (args.steps + 1)
    with tqdm(total=total, leave=False, disable=not sys.stderr.isatty()) as bar:
        speed = measure_data_speed(
            images, image_size=args.image_size, num_rounds=args.steps, tick=bar.update
        )
    size = args.image_size
    sys.stdout.write(
        f"{speed.num_images} JPEG files to crops of {size} x {size} pixels, one core\n\n"
    )
    sys.stdout.write(
        format_table(
            [
                ["", "images/s", "ratio"],
                ["OpenCLIP", f"{speed.open_clip:.0f}", "1.00"],
                ["clip-pgs", f"{speed.ours:.0f}", f"{speed.ratio:.2f}"],
            ]
        )
    )
    if args.output is not None:
        write_json({"image_size": size, **asdict(speed)}, args.output / FILE_NAME)
        sys.stdout.write(f"\n{args.output / FILE_NAME}\n")
