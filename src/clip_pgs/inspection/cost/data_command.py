"""`python -m clip_pgs.inspection data PATH...`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_pgs.inspection.cost.output import format_table, make_folder, write_json

FILE_NAME = "data.json"


def add_data_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "data",
        help="measure how fast JPEG files become training crops, and whether steps wait for them",
        description="Decode and crop JPEG files with one core, as training does and as OpenCLIP's "
        "trainer does, in turns. With --workers, also through training's loader, and with "
        "--step-seconds, beside training steps of that length; a step is a pause, which leaves "
        "the cores to the workers, as a GPU's step does.",
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
    add("--workers", type=int, metavar="W", help="loading processes")
    add("--batch-size", type=int, default=64, metavar="B", help="of the loader (default: 64)")
    add("--batches", type=int, default=24, metavar="N", help="that count (default: 24)")
    add("--step-seconds", type=float, metavar="S", help="how long a step takes that wants a batch")
    add("-o", "--output", type=Path, metavar="FOLDER", help=f"folder for {FILE_NAME}")


def run_data(args: argparse.Namespace) -> None:
    """Measure, print the table and write the file.

    Raises:
        ValueError: If an option or a path is wrong, or the file cannot be written.
    """
    # It takes seconds to import, which other commands need not wait for.
    from clip_pgs.inspection.cost.data_speed import measure_data_speed, read_jpegs

    _check(args)
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
    loader = None if args.workers is None else _run_loader(args, images)
    if args.output is not None:
        content = {"image_size": size, **asdict(speed), "loader": loader}
        write_json(content, args.output / FILE_NAME)
        sys.stdout.write(f"\n{args.output / FILE_NAME}\n")


def _check(args: argparse.Namespace) -> None:
    for name in ("image_size", "limit", "steps", "workers", "batch_size", "batches"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if args.step_seconds is None:
        return
    if args.workers is None:
        raise ValueError("--step-seconds needs --workers, whose batches the steps wait for")
    if not args.step_seconds > 0:
        raise ValueError(f"--step-seconds must be above 0, got {args.step_seconds}")


def _run_loader(args: argparse.Namespace, images: list[bytes]) -> dict[str, Any]:
    """Measure and print what the loader gives; return what the file says of it."""
    from clip_pgs.inspection.cost.loader_speed import measure_loader_speed, num_early_batches

    num_passes = 1 if args.step_seconds is None else 2
    total = num_passes * (num_early_batches(args.workers) + args.batches)
    with tqdm(total=total, leave=False, disable=not sys.stderr.isatty()) as bar:
        speed = measure_loader_speed(
            images,
            image_size=args.image_size,
            num_workers=args.workers,
            batch_size=args.batch_size,
            num_batches=args.batches,
            step_seconds=args.step_seconds,
            tick=bar.update,
        )
    cells = {
        "workers": str(speed.num_workers),
        "images/s": f"{speed.images_per_second:.0f}",
        "per worker": f"{speed.images_per_second_per_worker:.0f}",
        "s per batch": f"{speed.batch_size / speed.images_per_second:.3f}",
    }
    if speed.waiting_share is not None:
        cells |= {
            "s per step": f"{speed.step_seconds:g}",
            "waiting": f"{100 * speed.waiting_share:.1f} %",
        }
    sys.stdout.write(f"\nTraining's loader, batches of {speed.batch_size}\n\n")
    sys.stdout.write(format_table([list(cells), list(cells.values())]))
    return asdict(speed)
