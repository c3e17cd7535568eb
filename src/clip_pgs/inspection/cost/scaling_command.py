"""`python -m clip_pgs.inspection scaling`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from clip_pgs.inspection.cost.model_options import (
    add_model_options,
    describe_device,
    fill_in_defaults,
)
from clip_pgs.inspection.cost.output import format_table, make_folder, write_json
from clip_pgs.inspection.cost.scaling import ScalingRow, default_sizes, measure_scaling
from clip_pgs.inspection.strategies import parse_specs

FILE_NAME = "scaling.json"


def add_scaling_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to a parser's."""
    parser = commands.add_parser(
        "scaling",
        help="measure how the time of a PGS selection, and of a step of many processes, grows",
        description="Time selections by pgs at 16 x 16 pixels per patch while patches, candidates "
        "or images grow. An exponent of 1 is linear growth. With --processes, also time "
        "data-parallel training steps of 1, 2, 4 and so on processes on this machine, each with "
        "a batch of its own and, on GPUs, a GPU of its own.",
        allow_abbrev=False,
    )
    parser.set_defaults(run=run_scaling)
    add_model_options(parser)
    add = parser.add_argument
    add(
        "--batch-size",
        type=int,
        default=16,
        metavar="B",
        help="images of a selection, and samples per process of a step (default: 16)",
    )
    add("--steps", type=int, default=9, metavar="N", help="rounds that count (default: 9)")
    add(
        "--progress",
        type=float,
        default=0.0,
        metavar="T",
        help="share of training; above 0 embeddings are compared too (default: 0)",
    )
    add(
        "--processes",
        type=int,
        metavar="P",
        help="time steps of up to so many processes; of the options above, model, image size and "
        "precision are theirs",
    )
    add("--masking", default="pgs", metavar="NAME", help="of a step (default: pgs)")
    add("-o", "--output", type=Path, metavar="FOLDER", help=f"folder for {FILE_NAME}")


def run_scaling(args: argparse.Namespace) -> None:
    """Measure, print the tables and write the file.

    Raises:
        ValueError: If an option is out of its range, a process fails, or the file cannot be
            written.
    """
    fill_in_defaults(args)
    if args.processes is not None and args.processes < 1:
        raise ValueError(f"--processes must be at least 1, got {args.processes}")
    parse_specs([args.masking])
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
    facts = {"device": device, "progress": args.progress, "rounds": args.steps}
    content: dict[str, Any] = {**facts, "results": [asdict(row) for row in rows]}
    if args.processes is not None:
        content["processes"] = _run_processes(args)
    if args.output is not None:
        write_json(content, args.output / FILE_NAME)
        sys.stdout.write(f"\n{args.output / FILE_NAME}\n")


def _run_processes(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print steps of several processes; return what the file says of them."""
    # It takes seconds to import, which nothing else here needs.
    from clip_pgs.inspection.cost.world_scaling import SharedStep, measure_world, world_sizes

    step = SharedStep(
        model=args.model,
        image_size=args.image_size,
        masking=args.masking,
        batch_size=args.batch_size,
        precision=args.precision,
        device_type=args.device.type,
        # As many for one process as for all, so that they differ in nothing else.
        num_threads=max(1, torch.get_num_threads() // args.processes),
        num_steps=args.steps,
    )
    sizes = world_sizes(args.processes)
    with tqdm(total=len(sizes), leave=False, disable=not sys.stderr.isatty()) as bar:
        rows = measure_world(step, sizes, tick=bar.update)
    lines = [["processes", "ms per step", "samples/s", "per process", "efficiency"]]
    for row in rows:
        lines.append(
            [
                str(row.num_processes),
                f"{1e3 * row.seconds:.1f}",
                f"{row.samples_per_second:.1f}",
                f"{row.samples_per_second_per_process:.1f}",
                f"{row.efficiency:.2f}",
            ]
        )
    threads = f", {step.num_threads} threads each" if step.device_type == "cpu" else ""
    sys.stdout.write(
        f"\nTraining steps, {step.model}, {step.masking}, {step.batch_size} samples per process, "
        f"{step.precision}, {step.device_type}{threads}\n\n{format_table(lines)}"
    )
    return {**asdict(step), "results": [asdict(row) for row in rows]}


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
