"""How the time of a data-parallel training step grows with the processes that share it."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from clip_pgs.inspection.cost.benchmark_model import autocast_of, build_benchmark_model, draw_batch
from clip_pgs.inspection.cost.setups import Conditions, Setup
from clip_pgs.inspection.strategies import parse_specs

# The first steps connect the processes and divide the gradients into buckets.
_NUM_EARLY_STEPS = 2
_TIMEOUT = timedelta(minutes=10)


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
    if step.device_type == "cuda" and torch.cuda.device_count() < sizes[-1]:
        raise ValueError(
            f"{sizes[-1]} processes need as many GPUs, and there are {torch.cuda.device_count()}"
        )
    rows: list[WorldRow] = []
    for size in sizes:
        seconds = _time_steps(step, size)
        rate = step.batch_size / seconds
        alone = rows[0].samples_per_second_per_process if rows else rate
        rows.append(WorldRow(size, seconds, size * rate, rate, rate / alone))
        if tick is not None:
            tick()
    return rows


def _time_steps(step: SharedStep, num_processes: int) -> float:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            multiprocessing.spawn(_take_steps, (num_processes, step, folder), num_processes)
        except (ProcessRaisedException, ProcessExitedException) as error:
            # What a process raised comes as its whole traceback.
            reason = error.msg.strip().splitlines()[-1]
            raise ValueError(f"a process failed, of {num_processes}: {reason}") from None
        times = [json.loads(_times_file(folder, r).read_text()) for r in range(num_processes)]
    return median(max(of_ranks) for of_ranks in zip(*times, strict=True))


def _times_file(folder: Path, rank: int) -> Path:
    return folder / f"{rank}.json"


def _take_steps(rank: int, world_size: int, step: SharedStep, folder: Path) -> None:
    """Take the steps of one process and write their seconds."""
    torch.set_num_threads(step.num_threads)
    is_cuda = step.device_type == "cuda"
    device = torch.device("cuda", rank) if is_cuda else torch.device("cpu")
    if is_cuda:
        torch.cuda.set_device(device)
    if world_size > 1:
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.FileStore(str(folder / "meeting"), world_size),
            rank=rank,
            world_size=world_size,
            timeout=_TIMEOUT,
        )
    setup = _build_setup(step, device, rank=rank)
    if world_size > 1:
        setup.share_steps(rank=rank, world_size=world_size)
    optimizer = torch.optim.AdamW(setup.model.parameters(), lr=1e-6, fused=True)
    seconds = []
    for _ in range(_NUM_EARLY_STEPS + step.num_steps):
        _wait_for_all(device, world_size)
        started = perf_counter()
        setup.forward().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if is_cuda:
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - started)
    _times_file(folder, rank).write_text(json.dumps(seconds[_NUM_EARLY_STEPS:]), encoding="utf-8")
    if world_size > 1:
        dist.destroy_process_group()


def _build_setup(step: SharedStep, device: torch.device, *, rank: int) -> Setup:
    args = argparse.Namespace(
        model=step.model,
        image_size=step.image_size,
        precision=step.precision,
        seed=step.seed,
        device=device,
    )
    model = build_benchmark_model(args)
    images, captions = draw_batch(
        model, "flickr8k", batch_size=step.batch_size, seed=step.seed + rank
    )
    conditions = Conditions(images.to(device), captions, autocast_of(args))
    (spec,) = parse_specs([step.masking])
    return Setup(spec.title, model, conditions, spec=spec)


def _wait_for_all(device: torch.device, world_size: int) -> None:
    if world_size > 1:
        dist.barrier(device_ids=[device.index] if device.type == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
