"""How the time of a selection, and of a step of many processes, grows: the command `scaling`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from open_clip.loss import ClipLoss
from torch import multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clip_pgs.files import check_writable, write_json
from clip_pgs.inspection.cost.step import (
    Benchmark,
    Columns,
    Setup,
    check_effect,
    describe_device,
    draw_images,
    fill_in_defaults,
    measured_table,
    time_parts,
)
from clip_pgs.inspection.model_input import parse_specs
from clip_pgs.masking import PatchInputs, create_masking
from clip_pgs.tables import counted

PATCH_SIZE, EMBED_DIM = 16, 768
SWEEPS = ("patches", "candidates", "images")

# The first steps connect the processes and divide the gradients into buckets.
_NUM_EARLY_STEPS = 2
_TIMEOUT = timedelta(minutes=10)


# A selection that grows


@dataclass(frozen=True)
class Size:
    """The size of a selection.

    Args:
        sweep: What varies around it, one of `SWEEPS`.
        side: Patches per row and per column of an image.
        candidate_ratio: Share of patches drawn as candidates.
        num_images: Images selected from together.
    """

    sweep: str
    side: int = 14
    candidate_ratio: float = 0.05
    num_images: int = 16

    @property
    def counts(self) -> tuple[int, int, int]:
        """N patches, C candidates and B images, in the order of `SWEEPS`."""
        num_patches = self.side**2
        return num_patches, max(1, round(self.candidate_ratio * num_patches)), self.num_images


def default_sizes(num_images: int) -> list[Size]:
    """Return three sweeps around 196 patches, 10 candidates and a number of images."""
    return [
        *(Size("patches", side=side, num_images=num_images) for side in (14, 20, 28)),
        *(Size("candidates", 14, ratio, num_images) for ratio in (0.05, 0.1, 0.2, 0.4)),
        *(Size("images", num_images=factor * num_images) for factor in (1, 2, 4)),
    ]


def measure_scaling(
    sizes: Sequence[Size], *, device: torch.device, num_rounds: int, progress: float = 0.0
) -> list[dict[str, Any]]:
    """Time selections by `pgs`, of every size once in each round.

    Args:
        sizes: Each sweep's in ascending order.
        device: Where the images are.
        num_rounds: Rounds that count; one more comes first.
        progress: Share of training; above 0 embeddings are compared too.

    Returns:
        A row per size: its `sweep`, `num_patches` N, `num_candidates` C, `num_images` B, `seconds`,
        median over rounds, and `exponent`, of the power law from the sweep's first size to this
        one: 1 is linear growth, None for the first size.
    """
    selections = [_selection(size, device, progress) for size in sizes]
    seconds: list[list[float]] = [[] for _ in sizes]
    steps = product(range(num_rounds + 1), zip(selections, seconds, strict=True))
    for _, (select, record) in tqdm(list(steps), leave=False, disable=None):
        record += time_parts(device, select)
    rows = []
    first: dict[str, tuple[int, float]] = {}
    for size, record in zip(sizes, seconds, strict=True):
        taken, varied = median(record[1:]), size.counts[SWEEPS.index(size.sweep)]
        start, start_taken = first.setdefault(size.sweep, (varied, taken))
        is_first = varied == start
        exponent = None if is_first else math.log(taken / start_taken) / math.log(varied / start)
        counts = zip(("num_patches", "num_candidates", "num_images"), size.counts, strict=True)
        rows.append({"sweep": size.sweep, **dict(counts), "seconds": taken, "exponent": exponent})
    return rows


def _selection(size: Size, device: torch.device, progress: float) -> Callable[[], object]:
    side = size.side * PATCH_SIZE
    pixels = draw_images((side, side), batch_size=size.num_images).to(device)
    tokens = torch.randn(size.num_images, size.side**2, EMBED_DIM, device=device)
    inputs = PatchInputs(pixels, PATCH_SIZE, tokens=tokens, progress=progress)
    strategy = create_masking("pgs", candidate_ratio=size.candidate_ratio)
    return torch.no_grad()(lambda: strategy(inputs))


# A step that processes share


def world_sizes(num_processes: int) -> list[int]:
    """Return 1, 2, 4 and so on, and the number itself at the end."""
    powers = [2**k for k in range(num_processes.bit_length()) if 2**k < num_processes]
    return [*powers, num_processes]


def measure_world(
    benchmark: Benchmark,
    masking: str,
    sizes: Sequence[int],
    *,
    num_steps: int,
    num_threads: int = 1,
) -> list[dict[str, Any]]:
    """Time a step on real processes of this machine, one number of processes after the other.

    Gradients are averaged by DDP, over gloo on the CPU and NCCL on GPUs; a single process takes
    its steps without it, as training does.

    Args:
        benchmark: What is run, with the batch of each process; on GPUs each has its own.
        masking: A strategy, with options behind a colon.
        sizes: Numbers of processes, ascending from 1.
        num_steps: Steps that count.
        num_threads: Of each process, on the CPU.

    Returns:
        A row per number: `num_processes`, `seconds` of a step on the slowest process, by the clock,
        median over steps, `samples_per_second` of all together, `samples_per_second_per_process`,
        and `efficiency`, the latter over what one process reaches alone.

    Raises:
        ValueError: If there are fewer GPUs than processes, or a process failed.
    """
    _check_gpus(benchmark.device, sizes[-1])
    rows: list[dict[str, Any]] = []
    for size in tqdm(sizes, leave=False, disable=None):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            options = (size, benchmark, masking, num_steps, num_threads, folder)
            try:
                multiprocessing.spawn(_take_steps, options, size)
            except (ProcessRaisedException, ProcessExitedException) as error:
                # What a process raised comes as its whole traceback.
                reason = error.msg.strip().splitlines()[-1]
                raise ValueError(f"a process failed, of {size}: {reason}") from None
            times = [
                json.loads((folder / f"{rank}.json").read_text("utf-8")) for rank in range(size)
            ]
        seconds = median(max(of_ranks) for of_ranks in zip(*times, strict=True))
        rate = benchmark.batch_size / seconds
        alone = rows[0]["samples_per_second"] if rows else rate
        row = {
            "num_processes": size,
            "seconds": seconds,
            "samples_per_second": size * rate,
            "samples_per_second_per_process": rate,
            "efficiency": rate / alone,
        }
        rows.append(row)
    return rows


def _check_gpus(device: torch.device, num_processes: int) -> None:
    if device.type == "cuda" and torch.cuda.device_count() < num_processes:
        raise ValueError(
            f"{num_processes} processes need as many GPUs, and there are "
            f"{torch.cuda.device_count()}"
        )


def _take_steps(
    rank: int,
    world_size: int,
    benchmark: Benchmark,
    masking: str,
    num_steps: int,
    num_threads: int,
    folder: Path,
) -> None:
    """Take the steps of one process and write their seconds."""
    torch.set_num_threads(num_threads)
    is_cuda, is_shared = benchmark.device.type == "cuda", world_size > 1
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    if is_shared:
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.FileStore(str(folder / "store"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
    model = replace(benchmark, device=device).build()
    images, texts = replace(benchmark, device=device, seed=benchmark.seed + rank).draw(model)
    setup = Setup(model, benchmark, images, texts, *parse_specs([masking]))
    if is_shared:
        # Each process's features with those of all, as OpenCLIP's trainer compares them on many
        # (`--local-loss --gather-with-grad`). DDP raises when it is given the CPU.
        setup.runnable = DistributedDataParallel(
            setup.runnable, device_ids=[device] if is_cuda else None
        )
        setup.loss = ClipLoss(
            local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size
        )
    optimizer = torch.optim.AdamW(setup.model.parameters(), lr=1e-6, fused=True)
    seconds = []
    for _ in range(_NUM_EARLY_STEPS + num_steps):
        if is_shared:
            dist.barrier(device_ids=[rank] if is_cuda else None)
        if is_cuda:
            torch.cuda.synchronize(device)
        started = perf_counter()
        setup.forward().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if is_cuda:
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - started)
    (folder / f"{rank}.json").write_text(json.dumps(seconds[_NUM_EARLY_STEPS:]), encoding="utf-8")
    if is_shared:
        dist.destroy_process_group()


# The command


def run_scaling(args: argparse.Namespace) -> None:
    """Measure, print the tables and write the file.

    Raises:
        ValueError: If an option is out of its range, a process fails, or the file cannot be
            written.
    """
    check_effect(args, "processes", "model", "image_size", "precision", "masking")
    fill_in_defaults(args)
    if args.processes is not None:
        args.masking = args.masking or "pgs"
        parse_specs([args.masking])
        _check_gpus(args.device, args.processes)
        replace(Benchmark.of(args), device=torch.device("meta")).build()
    if args.output is not None:
        check_writable(args.output / "scaling.json")
    sizes = default_sizes(args.batch_size)
    rows = measure_scaling(sizes, device=args.device, num_rounds=args.steps, progress=args.progress)
    device = describe_device(args.device)
    table = measured_table(
        [row | {"each": row["seconds"] / row["num_images"]} for row in rows],
        {
            "more": ("sweep", 1, "{}"),
            "N": ("num_patches", 1, "{}"),
            "C": ("num_candidates", 1, "{}"),
            "B": ("num_images", 1, "{}"),
            "ms": ("seconds", 1e3, "{:.2f}"),
            "us per image": ("each", 1e6, "{:.0f}"),
            "exponent": ("exponent", 1, "{:.2f}"),
        },
    )
    sys.stdout.write(f"PGS selection, {device}, progress {args.progress}\n\n{table}")
    facts: dict[str, Any] = {
        "device": device,
        "progress": args.progress,
        "rounds": args.steps,
        "results": rows,
    }
    if args.processes is not None:
        facts["processes"] = _run_processes(args)
    if args.output is not None:
        write_json(args.output / "scaling.json", facts)
        sys.stdout.write(f"\n{args.output / 'scaling.json'}\n")


def _run_processes(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print steps of several processes; return what the file says of them."""
    # Steps are as training takes them; `--progress` is that of the selections.
    benchmark = replace(Benchmark.of(args), progress=0.0)
    # As many for one process as for all, so that they differ in nothing else.
    num_threads = max(1, torch.get_num_threads() // args.processes)
    rows = measure_world(
        benchmark,
        args.masking,
        world_sizes(args.processes),
        num_steps=args.steps,
        num_threads=num_threads,
    )
    columns: Columns = {
        "processes": ("num_processes", 1, "{}"),
        "ms per step": ("seconds", 1e3, "{:.1f}"),
        "samples/s": ("samples_per_second", 1, "{:.1f}"),
        "per process": ("samples_per_second_per_process", 1, "{:.1f}"),
        "efficiency": ("efficiency", 1, "{:.2f}"),
    }
    threads = f", {counted(num_threads, 'thread')} each" if args.device.type == "cpu" else ""
    sys.stdout.write(
        f"\nTraining steps, {args.model}, {args.masking}, "
        f"{counted(args.batch_size, 'sample')} per process, {args.precision}, "
        f"{args.device.type}{threads}\n\n{measured_table(rows, columns)}"
    )
    same = ("model", "image_size", "masking", "batch_size", "precision")
    return {
        **{name: getattr(args, name) for name in same},
        "device_type": args.device.type,
        "num_threads": num_threads,
        "num_steps": args.steps,
        "seed": benchmark.seed,
        "results": rows,
    }
