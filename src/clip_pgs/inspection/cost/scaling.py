"""How the time of a selection, and of a step of many processes, grows: the command `scaling`."""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
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

from clip_pgs.common import check_writable
from clip_pgs.inspection.cost.step import (
    Benchmark,
    Setup,
    describe_device,
    draw_images,
    fill_in_defaults,
    number_cell,
    time_parts,
    write_json,
)
from clip_pgs.inspection.model_input import parse_specs
from clip_pgs.masking import PatchInputs, create_masking
from clip_pgs.tables import Table

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


@dataclass(frozen=True)
class ScalingRow:
    """A size and what a selection of that size took.

    Attributes:
        sweep: What varies, one of `SWEEPS`.
        num_patches: N.
        num_candidates: C.
        num_images: B.
        seconds: Median over rounds.
        exponent: Of the power law from the sweep's first size to this one; 1 is linear growth,
            None for the first size.
    """

    sweep: str
    num_patches: int
    num_candidates: int
    num_images: int
    seconds: float
    exponent: float | None


def default_sizes(num_images: int) -> list[Size]:
    """Return three sweeps around 196 patches, 10 candidates and a number of images."""
    return [
        *(Size("patches", side=side, num_images=num_images) for side in (14, 20, 28)),
        *(Size("candidates", 14, ratio, num_images) for ratio in (0.05, 0.1, 0.2, 0.4)),
        *(Size("images", num_images=factor * num_images) for factor in (1, 2, 4)),
    ]


def measure_scaling(
    sizes: Sequence[Size],
    *,
    device: torch.device,
    num_rounds: int,
    progress: float = 0.0,
    tick: Callable[[], object] | None = None,
) -> list[ScalingRow]:
    """Time selections by `pgs`, of every size once in each round.

    Args:
        sizes: Each sweep's in ascending order.
        device: Where the images are.
        num_rounds: Rounds that count; one more comes first.
        progress: Share of training; above 0 embeddings are compared too.
        tick: Called after every selection.
    """
    selections = [_selection(size, device, progress) for size in sizes]
    seconds: list[list[float]] = [[] for _ in sizes]
    for _ in range(num_rounds + 1):
        for select, record in zip(selections, seconds, strict=True):
            record += time_parts(device, select)
            if tick is not None:
                tick()
    rows: list[ScalingRow] = []
    first: dict[str, tuple[int, float]] = {}
    for size, record in zip(sizes, seconds, strict=True):
        taken, varied = median(record[1:]), size.counts[SWEEPS.index(size.sweep)]
        start, start_taken = first.setdefault(size.sweep, (varied, taken))
        exponent = None
        if varied != start:
            exponent = math.log(taken / start_taken) / math.log(varied / start)
        rows.append(ScalingRow(size.sweep, *size.counts, taken, exponent))
    return rows


def _selection(size: Size, device: torch.device, progress: float) -> Callable[[], object]:
    side = size.side * PATCH_SIZE
    pixels = draw_images((side, side), batch_size=size.num_images).to(device)
    tokens = torch.randn(size.num_images, size.side**2, EMBED_DIM, device=device)
    inputs = PatchInputs(pixels, PATCH_SIZE, tokens=tokens, progress=progress)
    strategy = create_masking("pgs", candidate_ratio=size.candidate_ratio)
    return torch.no_grad()(lambda: strategy(inputs))


# A step that processes share


@dataclass(frozen=True)
class SharedStep:
    """The step that is timed, the same on every process but for its data.

    Args:
        model: What open_clip calls it, or a model config.
        image_size: In pixels; None is the model's.
        masking: A strategy, with options behind a colon.
        batch_size: Samples per process.
        precision: As OpenCLIP names it.
        device_type: "cpu" or "cuda"; each process has a GPU of its own.
        num_threads: Of each process, on the CPU.
        num_steps: Steps that count.
        seed: Of weights and data.
    """

    model: str
    image_size: int | None
    masking: str
    batch_size: int
    precision: str
    device_type: str
    num_threads: int
    num_steps: int
    seed: int = 0


@dataclass(frozen=True)
class WorldRow:
    """What a step takes on so many processes.

    Attributes:
        num_processes: They share the step, each with a batch of its own.
        seconds: Of a step on the slowest process, by the clock, median over steps.
        samples_per_second: Of all processes together.
        samples_per_second_per_process: Of one of them.
        efficiency: The latter over what one process reaches alone.
    """

    num_processes: int
    seconds: float
    samples_per_second: float
    samples_per_second_per_process: float
    efficiency: float


def world_sizes(num_processes: int) -> list[int]:
    """Return 1, 2, 4 and so on, and the number itself at the end."""
    powers = [2**k for k in range(num_processes.bit_length()) if 2**k < num_processes]
    return [*powers, num_processes]


def measure_world(
    step: SharedStep,
    sizes: Sequence[int],
    *,
    tick: Callable[[], object] | None = None,
) -> list[WorldRow]:
    """Time a step on real processes of this machine, one number of processes after the other.

    Gradients are averaged by DDP, over gloo on the CPU and NCCL on GPUs; a single process takes
    its steps without it, as training does.

    Args:
        step: What is timed.
        sizes: Numbers of processes, ascending from 1.
        tick: Called after each of them.

    Raises:
        ValueError: If there are fewer GPUs than processes, or a process failed.
    """
    _check_gpus(step.device_type, sizes[-1])
    rows: list[WorldRow] = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            try:
                multiprocessing.spawn(_take_steps, (size, step, folder), size)
            except (ProcessRaisedException, ProcessExitedException) as error:
                # What a process raised comes as its whole traceback.
                reason = error.msg.strip().splitlines()[-1]
                raise ValueError(f"a process failed, of {size}: {reason}") from None
            times = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]
        seconds = median(max(of_ranks) for of_ranks in zip(*times, strict=True))
        rate = step.batch_size / seconds
        alone = rows[0].samples_per_second_per_process if rows else rate
        rows.append(WorldRow(size, seconds, size * rate, rate, rate / alone))
        if tick is not None:
            tick()
    return rows


def _check_gpus(device_type: str, num_processes: int) -> None:
    if device_type == "cuda" and torch.cuda.device_count() < num_processes:
        raise ValueError(
            f"{num_processes} processes need as many GPUs, and there are "
            f"{torch.cuda.device_count()}"
        )


def _take_steps(rank: int, world_size: int, step: SharedStep, folder: Path) -> None:
    """Take the steps of one process and write their seconds."""
    torch.set_num_threads(step.num_threads)
    is_cuda, is_shared = step.device_type == "cuda", world_size > 1
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
    benchmark = Benchmark(step.model, step.image_size, device, step.precision, step.seed)
    model = benchmark.build()
    conditions = benchmark.conditions(
        model, "flickr8k", batch_size=step.batch_size, seed=step.seed + rank
    )
    setup = Setup(model, conditions, *parse_specs([step.masking]))
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
    for _ in range(_NUM_EARLY_STEPS + step.num_steps):
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
    fill_in_defaults(args)
    parse_specs([args.masking])
    if args.processes is not None:
        _check_gpus(args.device.type, args.processes)
    if args.output is not None:
        check_writable(args.output / "scaling.json")
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
    lines = [
        [
            row.sweep,
            row.num_patches,
            row.num_candidates,
            row.num_images,
            number_cell(1e3 * row.seconds, "{:.2f}"),
            number_cell(1e6 * row.seconds / row.num_images, "{:.0f}"),
            number_cell(row.exponent, "{:.2f}"),
        ]
        for row in rows
    ]
    table = Table.of(["more", "N", "C", "B", "ms", "us per image", "exponent"], lines).text()
    sys.stdout.write(f"PGS selection, {device}, progress {args.progress}\n\n{table}")
    facts: dict[str, Any] = {
        "device": device,
        "progress": args.progress,
        "rounds": args.steps,
        "results": [asdict(row) for row in rows],
    }
    if args.processes is not None:
        facts["processes"] = _run_processes(args)
    if args.output is not None:
        write_json(args.output / "scaling.json", facts)
        sys.stdout.write(f"\n{args.output / 'scaling.json'}\n")


def _run_processes(args: argparse.Namespace) -> dict[str, Any]:
    """Measure and print steps of several processes; return what the file says of them."""
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
    header = ["processes", "ms per step", "samples/s", "per process", "efficiency"]
    lines = [
        [
            row.num_processes,
            number_cell(1e3 * row.seconds, "{:.1f}"),
            number_cell(row.samples_per_second, "{:.1f}"),
            number_cell(row.samples_per_second_per_process, "{:.1f}"),
            number_cell(row.efficiency, "{:.2f}"),
        ]
        for row in rows
    ]
    threads = f", {step.num_threads} threads each" if step.device_type == "cpu" else ""
    sys.stdout.write(
        f"\nTraining steps, {step.model}, {step.masking}, {step.batch_size} samples per process, "
        f"{step.precision}, {step.device_type}{threads}\n\n{Table.of(header, lines).text()}"
    )
    return {**asdict(step), "results": [asdict(row) for row in rows]}
