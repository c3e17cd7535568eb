"""Shards that can only be read from the beginning, from OpenCLIP's data flags."""

from __future__ import annotations

import argparse
import logging

from clip_pgs.data.sequential.sequential_sources import (
    ResampledShards,
    SequentialSource,
    ShuffledShards,
)
from clip_pgs.data.tar.shards import count_samples, expand_shards, upsampling_weights

logger = logging.getLogger(__name__)


def count_sequential(args: argparse.Namespace) -> int:
    """Return the samples of an epoch of `--train-data`, as they are stated.

    Raises:
        ValueError: If they are not.
    """
    num_samples = args.train_num_samples
    if num_samples is None:
        num_samples = count_samples(expand_shards(args.train_data))
    if num_samples is None:
        raise ValueError(
            f"the number of samples in {args.train_data!r} is not known; give "
            "--train-num-samples (`python -m clip_pgs.data check` counts them)"
        )
    if num_samples < 1:
        raise ValueError(f"--train-num-samples must be >= 1, got {num_samples}")
    return num_samples


def sequential_source(args: argparse.Namespace, *, world_size: int) -> SequentialSource:
    """Return what the workers read of `--train-data`.

    Raises:
        ValueError: If there are fewer shards than processes.
    """
    shards = expand_shards(args.train_data)
    if args.dataset_resampled:
        factors = args.train_data_upsampling_factors
        weights = None if factors is None else upsampling_weights(args.train_data, factors)
        return ResampledShards(shards, weights=weights, seed=args.seed)
    check_enough_shards(len(shards), world_size)
    return ShuffledShards(shards, seed=args.seed)


def check_enough_shards(num_shards: int, world_size: int) -> None:
    """Refuse fewer shards than processes, which read one each."""
    if num_shards < world_size:
        raise ValueError(
            f"{num_shards} shards cannot feed {world_size} processes, as they can only be read "
            "from the beginning; each needs one of its own (or --dataset-resampled)"
        )


def num_sequential_workers(
    args: argparse.Namespace, *, num_shards: int, num_batches: int, world_size: int
) -> int:
    """Return as many workers as the shards can feed; say so where that is fewer than asked for.

    Args:
        args: OpenCLIP's options.
        num_shards: Shards of `--train-data`.
        num_batches: Batches of an epoch on each rank.
        world_size: Number of processes.
    """
    # A worker with less than one batch of its own would repeat samples within a batch.
    num_workers = min(args.workers, num_batches)
    if not args.dataset_resampled:
        num_workers = min(num_workers, num_shards // world_size)
    if num_workers < args.workers:
        logger.warning(
            "%d workers per process instead of --workers %d: %d shards with %d batches per "
            "process feed no more",
            num_workers,
            args.workers,
            num_shards,
            num_batches,
        )
    return num_workers
