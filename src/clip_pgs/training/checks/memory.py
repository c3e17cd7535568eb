"""Shared memory: through `/dev/shm` go the batches of data workers, and containers have little."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import open_clip
import torch

from clip_pgs.data.decoding import pixel_normalizer
from clip_pgs.training.checks.data import has_training_data, num_training_samples
from clip_pgs.training.checks.model import image_size, read_model_config
from clip_pgs.training.options import TrainOptions
from clip_pgs.training.phases import phase_options

_FOLDER = Path("/dev/shm")
# What torch's loaders fetch ahead for each worker.
_PREFETCH = 2
_FLOAT_BYTES = 4


def check_shared_memory(args: TrainOptions) -> None:
    """Refuse batches of which the workers' cannot be kept in shared memory at the same time."""
    if args.workers == 0 or not _FOLDER.is_dir():
        return
    size = image_size(args) or read_model_config(args.model)["vision_cfg"].get("image_size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    pixels = 3 * height * width
    num_batches, batch_size, num_bytes, processes = max(
        _loaders(args, pixels, size), key=lambda loader: loader[0] * loader[2] * loader[3]
    )
    needed, free = num_batches * num_bytes * processes, shutil.disk_usage(_FOLDER).free
    if needed > free:
        raise ValueError(
            f"{processes} x {num_batches} batches of {batch_size} images of {height} x {width} on "
            f"their way from --workers {args.workers} need {needed / 1e6:.0f} MB of shared memory, "
            f"and {_FOLDER} has {free / 1e6:.0f} MB: give the container more (docker run "
            f"--shm-size {needed // 2**30 + 1}g), or take fewer --workers or a smaller --batch-size"
        )


def _loaders(
    args: TrainOptions, pixels: int, size: int | list[int]
) -> list[tuple[int, int, int, int]]:
    """Return (batches ahead, batch size, bytes of a batch, processes) of each loader of a run."""
    ahead = _PREFETCH * args.workers + 1
    held_out = min(args.batch_size, 256) if args.eval_suite else 0
    if args.val_data or args.imagenet_val or args.imagenet_v2:
        held_out = args.batch_size
    loaders = [(ahead, held_out, held_out * pixels * _FLOAT_BYTES, 1)]
    if not has_training_data(args):
        return loaders
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    transform = open_clip.image_transform(
        tuple(size) if isinstance(size, list) else size, is_train=True, aug_cfg=dict(args.aug_cfg)
    )
    is_bytes = pixel_normalizer(transform, device=torch.device("cpu")) is not None
    num_samples = num_training_samples(args) or 0
    for phase in phase_options(args):
        num_bytes = phase.batch_size * pixels * (1 if is_bytes else _FLOAT_BYTES)
        num_batches = min(ahead, num_samples // (phase.batch_size * processes))
        loaders.append((num_batches, phase.batch_size, num_bytes, processes))
    return loaders
