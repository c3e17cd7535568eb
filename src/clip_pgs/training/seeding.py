"""Every random number of a run, from one seed.

A number is keyed by what it is for, not by when it is drawn: the weights by the seed alone, a
rank's stream by (seed, rank, step), the masks of a step by (seed, step) and a sample's place in
the global batch. Accumulation, world size and resuming thus change no mask.
"""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from clip_pgs.data.plan import stable_seed


def seed_everything(seed: int) -> None:
    """Seed the global streams of Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def step_noise(
    seed: int, step: int, *, num_samples: int, num_patches: int, device: torch.device
) -> Tensor:
    """Draw the numbers behind all masks of one optimiser step.

    Args:
        seed: The run's seed.
        step: Optimiser steps completed before this one.
        num_samples: Samples of the step over all ranks and micro-batches.
        num_patches: Patches per image.
        device: Where to draw. The CPU and CUDA draw different numbers.

    Returns:
        Uniform numbers in [0, 1), the same on every rank. Shape (num_samples, num_patches),
        float32.
    """
    generator = torch.Generator(device).manual_seed(stable_seed(seed, "masks", step))
    return torch.rand((num_samples, num_patches), generator=generator, device=device)


def micro_batch_rows(*, micro_batch: int, rank: int, world_size: int, batch_size: int) -> slice:
    """Return which rows of the global batch one rank's micro-batch holds.

    The order is micro-batch, rank, sample: two ranks without accumulation and one process with
    two micro-batches that read the same samples give them the same rows.
    """
    start = (micro_batch * world_size + rank) * batch_size
    return slice(start, start + batch_size)
