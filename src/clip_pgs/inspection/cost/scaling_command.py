"""`python -m clip_pgs.inspection scaling`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from clip_pgs.inspection.cost.model_options import describe_device
from clip_pgs.inspection.cost.output import format_table, make_folder, write_json
from clip_pgs.inspection.cost.scaling import ScalingRow, default_sizes, measure_scaling

FILE_NAME = "scaling.json"


def add_scaling_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "scaling",
        help="measure how the time of a PGS selection grows",
        description="Time selections by pgs at 16 x 16 pixels per patch while patches, candidates "
        "or images grow. An exponent of 1 is linear growth.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_scaling)
    add = parser.add_argument
    add("--batch-size", type=int, default=16, metavar="B", help="images (default: 16)")
    add("--steps", type=int, default=9, metavar="N", help="rounds that count (default: 9)")
    add(
        "--progress",
        type=float,
        default=0.0,
        metavar="T",
        help="share of training; above 0 embeddings are compared too (default: 0)",
    )
    add(
        "--device",
        type=torch.device,
        default=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        help="default: cuda where there is one, else cpu",
    )
    add("-o", "--output", type=Path, metavar="FOLDER", help=f"folder for {FILE_NAME}")


def run_scaling(args: argparse.Namespace) -> None:
    """Measure, print the table and write the file.

    Raises:
        ValueError: If an option is out of its range, or the file cannot be written.
    """
    for name in ("batch_size", "steps"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} must be at least 1, got {getattr(args, name)}")
    if args.output is not None:
        make_folder(args.output)
    sizes = default_sizes(args.batch_size)
    total = (args.steps + 1) * len(sizes)
    with tqdm(total=total, leave=False, disable=not sys.stderr.isatty()) as bar:
        rows = measure_scaling(
            sizes,
            device=args.device,
            num_rounds=args.steps,
            progress=args.progress,
            tick=bar.update,
        )
    device = describe_device(args.device)
    sys.stdout.write(f"PGS selection, {device}, progress {args.progress}\n\n{_table(rows)}")
    if args.output is not None:
        facts = {"device": device, "progress": args.progress, "rounds": args.steps}
        content = {**facts, "results": [asdict(row) for row in rows]}
        write_json(content, args.output / FILE_NAME)
        sys.stdout.write(f"\n{args.output / FILE_NAME}\n")


def _table(rows: list[ScalingRow]) -> str:
    lines = [["more", "N", "C", "B", "ms", "us per image", "exponent"]]
    for row in rows:
        lines.append(
            [
                row.sweep,
                str(row.num_patches),
                str(row.num_candidates),
                str(row.num_images),
                f"{1e3 * row.seconds:.2f}",
                f"{1e6 * row.seconds / row.num_images:.0f}",
                "-" if row.exponent is None else f"{row.exponent:.2f}",
            ]
        )
    return format_table(lines)
