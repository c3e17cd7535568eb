"""Run the cost benchmark as the command line asks."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime, timezone
from typing import Any

import open_clip
import torch
from tqdm import tqdm

from clip_pgs.inspection.cost.benchmark_model import autocast_of, build_benchmark_model, draw_batch
from clip_pgs.inspection.cost.compilation import allow_graphs_of, watch_compilation
from clip_pgs.inspection.cost.flop_count import count_step_flops
from clip_pgs.inspection.cost.model_options import describe_device, fill_in_defaults
from clip_pgs.inspection.cost.output import make_folder, write_json
from clip_pgs.inspection.cost.peaks import Peak, known_peak, measured_peak
from clip_pgs.inspection.cost.plot import plot_cost
from clip_pgs.inspection.cost.report import COMPILED_LEGEND, LEGEND, cost_content, cost_table
from clip_pgs.inspection.cost.rows import make_rows
from clip_pgs.inspection.cost.setups import PLAIN_TITLE, Conditions, build_setups
from clip_pgs.inspection.cost.timing import time_steps
from clip_pgs.inspection.strategies import parse_specs


def run_cost(args: argparse.Namespace) -> None:
    """Measure, print the table and write the files.

    Raises:
        ValueError: If an option is wrong, or a file cannot be written.
    """
    fill_in_defaults(args)
    if not 0.0 <= args.progress <= 1.0:
        raise ValueError(f"--progress must be in [0, 1], got {args.progress}")
    specs = parse_specs(args.maskings, mask_ratio=args.mask_ratio)
    if args.output is not None:
        make_folder(args.output)
    model = build_benchmark_model(args)
    images, captions = draw_batch(model, args.captions, batch_size=args.batch_size, seed=args.seed)
    conditions = Conditions(
        images=images.to(args.device),
        captions=captions,
        autocast=autocast_of(args),
        progress=args.progress,
        trims=not args.no_trimming,
        pack_tokens=args.pack_tokens,
        compiles=args.compile,
    )
    setups = build_setups(model, specs, conditions, mask_ratio=args.mask_ratio)
    flops = [count_step_flops(setup) for setup in setups]
    peak = _peak(args)
    compilations = None
    if args.compile:
        compilations = [watch_compilation(s, vocab_size=model.vocab_size) for s in setups]
        allow_graphs_of(len(setups))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    total = (args.steps + 1) * len(setups)
    with tqdm(total=total, leave=False, disable=not sys.stderr.isatty()) as bar:
        timings = time_steps(setups, optimizer, num_rounds=args.steps, progress=bar.update)
    rows = make_rows(
        [setup.title for setup in setups],
        timings,
        flops=flops,
        text_tokens=[setup.text_tokens() for setup in setups],
        batch_size=args.batch_size,
        peak=peak,
        compilations=compilations,
    )
    facts = _facts(args, tuple(images.shape[2:]), peak)
    title = _describe(facts)
    legend = LEGEND + ("peak" if peak is None else f"{peak.flops / 1e9:.0f} GFLOP/s, {peak.source}")
    if compilations is not None:
        legend += f"\n{COMPILED_LEGEND}"
    table = cost_table(rows, batch_size=args.batch_size)
    sys.stdout.write(f"{title}\n\n{table}\n{legend}\n")
    if args.output is not None:
        write_json(cost_content(rows, facts), args.output / "cost.json")
        picture = args.output / "cost.png"
        plot_cost(rows, picture, batch_size=args.batch_size, peak=peak, title=title)
        sys.stdout.write(f"\n{args.output}: cost.json, cost.png\n")


def _peak(args: argparse.Namespace) -> Peak | None:
    if args.device.type == "cuda":
        name = torch.cuda.get_device_name(args.device)
        return known_peak(name, is_half=args.precision != "fp32")
    # A CPU's data sheet says little about a virtual machine's share of it.
    return measured_peak(args.device) if args.precision == "fp32" else None


def _facts(
    args: argparse.Namespace, image_size: tuple[int, ...], peak: Peak | None
) -> dict[str, Any]:
    return {
        "model": args.model,
        "image_size": list(image_size),
        "batch_size": args.batch_size,
        "device": describe_device(args.device),
        "precision": args.precision,
        "is_compiled": args.compile,
        "captions": args.captions,
        "is_trimmed": not args.no_trimming,
        "is_packed": args.pack_tokens,
        "mask_ratio": args.mask_ratio,
        "progress": args.progress,
        "rounds": args.steps,
        "reference": PLAIN_TITLE,
        "peak_flops": None if peak is None else peak.flops,
        "peak_source": None if peak is None else peak.source,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _describe(facts: dict[str, Any]) -> str:
    height, width = facts["image_size"]
    text = (
        f"{facts['model']} at {height} x {width}, batch {facts['batch_size']}, "
        f"{facts['precision']}, {facts['device']}"
    )
    return f"{text}, compiled" if facts["is_compiled"] else text
