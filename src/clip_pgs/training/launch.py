"""Before the first step: the run's name, its folder, and where it continues."""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from clip_pgs.checkpoint_io import find_checkpoint
from clip_pgs.training.checkpoints.checkpoint import load_checkpoint
from clip_pgs.training.checkpoints.checkpoint_files import find_latest
from clip_pgs.training.checks.data import has_training_data, training_files
from clip_pgs.training.distributed import Meeting
from clip_pgs.training.environment import describe_environment, save_environment
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.run_folder import run_folder, save_options
from clip_pgs.training.survival.restarts import launch_names, remember_name
from clip_pgs.training.telemetry.lenient import Lenient, LenientSink
from clip_pgs.training.telemetry.sinks import JsonLines, Sink, TensorBoard, WeightsAndBiases

LOG_NAME = "out.log"
PARAMS_NAME = "params.txt"
METRICS_NAME = "metrics.jsonl"

_logger = logging.getLogger(__name__)


def default_name(args: TrainOptions) -> str:
    """Return the name of a run that was given none: date, model and recipe, as OpenCLIP's."""
    parts = [
        datetime.now().strftime("%Y_%m_%d-%H_%M_%S"),
        f"model_{args.model.replace('/', '-').replace(':', '-')}",
        f"lr_{args.lr}",
        f"b_{args.batch_size}",
        f"j_{args.workers}",
        f"p_{args.precision}",
    ]
    return "-".join(parts)


def log_file(args: TrainOptions) -> Path | None:
    """Return the file this process logs to, None for none; its folder is made."""
    folder = run_folder(args)
    is_logging = args.local_rank == 0 if args.log_local else args.rank == 0
    if folder is None or not is_logging:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    return folder / (f"out-{args.rank}" if args.log_local else LOG_NAME)


def write_run_files(args: TrainOptions, folder: Path, device: torch.device) -> None:
    """Write what a run was started with: options, `params.txt`, `env.json`."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    files = training_files(args) if has_training_data(args) else []
    save_options(args, folder, files=files, launch=launch_names())
    remember_name(args.name or folder.name)
    lines = [f"{name}: {value}\n" for name, value in args.values().items()]
    (folder / PARAMS_NAME).write_text("".join(lines))
    save_environment(describe_environment(device=device, world_size=args.world_size), folder)


def load_start(args: TrainOptions, folder: Path | None, meeting: Meeting) -> dict[str, Any] | None:
    """Return the checkpoint that `--resume` names, None to start fresh.

    Rank 0 looks into a folder, so that all ranks load the same file.
    """
    path = args.resume
    if path == "latest":
        assert folder is not None
        path = _share_latest(args, folder, meeting) or args.resume_instead
        if path is None:
            _logger.info("No checkpoint in %s yet: starting fresh", folder)
    if path is None:
        return None
    path = meeting.share(str(find_checkpoint(path)) if args.rank == 0 else None)
    checkpoint = load_checkpoint(path)
    _logger.info(
        "Resuming from %s (epoch %d, sample %d of it)",
        path,
        checkpoint.get("epoch", 0),
        checkpoint.get("position", 0),
    )
    return checkpoint


def _share_latest(args: TrainOptions, folder: Path, meeting: Meeting) -> str | None:
    """Return on all ranks what rank 0 finds, or raise what it raises."""
    latest, trouble = None, ""
    if args.rank == 0:
        try:
            latest = find_latest(folder / "checkpoints")
        except ValueError as error:
            trouble = str(error)
    path, trouble = meeting.share((None if latest is None else str(latest), trouble))
    if trouble:
        raise ValueError(trouble)
    return path


def say_what_changed(args: TrainOptions, checkpoint: dict[str, Any], *, is_ordered: bool) -> None:
    """Log what another number of processes or batch size changes for a run that goes on.

    Args:
        args: Options, with `world_size`.
        checkpoint: Where it goes on from.
        is_ordered: Whether the order of the samples is the same for any of them.
    """
    record = checkpoint.get("clip_pgs", {})
    now = {name: getattr(args, name) for name in ("batch_size", "accum_freq", "world_size")}
    earlier = {**record.get("recipe", {}), "world_size": record.get("world_size")}
    changes = [
        f"{name} {earlier[name]} -> {value}"
        for name, value in now.items()
        if earlier.get(name) not in (None, value)
    ]
    if not changes:
        return
    order = "in the order that they had" if is_ordered else "in another order"
    _logger.warning(
        "The run goes on with %s: from the same number of samples, %s, in other steps",
        ", ".join(changes),
        order,
    )


def open_sinks(args: TrainOptions, folder: Path | None, *, first_step: int) -> list[Sink]:
    """Return where this process's measurements go; nowhere without a run folder.

    One that cannot be written says so once, and the run goes on.

    Args:
        args: Options.
        folder: The run's folder on rank 0, None elsewhere.
        first_step: The step this launch starts at.
    """
    if folder is None:
        return []
    targets = {target.strip() for target in args.report_to.split(",")}
    makers: dict[str, Callable[[], Sink]] = {
        METRICS_NAME: lambda: JsonLines(folder / METRICS_NAME, first_step=first_step)
    }
    if targets & {"tensorboard", "all"}:
        makers["tensorboard"] = lambda: TensorBoard(folder / "tensorboard", first_step=first_step)
    if targets & {"wandb", "all"}:
        makers["wandb"] = lambda: WeightsAndBiases(args, folder / PARAMS_NAME)
    sinks: list[Sink] = []
    for name, make in makers.items():
        with Lenient(name):
            sinks.append(LenientSink(make(), name))
    return sinks
