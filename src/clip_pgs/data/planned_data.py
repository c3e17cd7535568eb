"""Data whose samples can be read in any order, and their order, from OpenCLIP's data flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from clip_pgs.data.epoch_plan import EpochPlan, OrderedPlan, ResampledPlan, RowPlan, ShardPlan
from clip_pgs.data.samples import Skip
from clip_pgs.data.sources import BlankSource, Source, TableSource
from clip_pgs.data.tables import PairTable, read_pairs
from clip_pgs.data.tar.shard_sizes import size_shards
from clip_pgs.data.tar.shard_source import ShardSource
from clip_pgs.data.tar.shards import expand_shards, upsampling_weights

DatasetKind = Literal["webdataset", "csv", "synthetic"]


@dataclass(frozen=True)
class PlannedData:
    """Samples and their order.

    Args:
        source: Reads them.
        plan: Orders them.
        num_samples: Samples of an epoch, whether or not the plan has as many.
        failures: What is wrong with whole shards.
    """

    source: Source
    plan: EpochPlan
    num_samples: int
    failures: list[Skip] = field(default_factory=list)


def plan_training(args: argparse.Namespace, kind: DatasetKind, transform: Callable) -> PlannedData:
    """Return the samples of `--train-data`, shuffled.

    Args:
        args: OpenCLIP's options.
        kind: What they are; shards must be seekable.
        transform: Of the images.

    Raises:
        ValueError: If the options name no data.
    """
    if kind == "csv":
        table = read_table(args, args.train_data)
        plan: EpochPlan = RowPlan(len(table), seed=args.seed)
        return PlannedData(TableSource(table), plan, len(table))
    if kind == "synthetic":
        return _blank_data(args.train_num_samples, transform)

    shards = expand_shards(args.train_data)
    sizes = size_shards(shards)
    if args.dataset_resampled:
        factors = args.train_data_upsampling_factors
        weights = None if factors is None else upsampling_weights(args.train_data, factors)
        plan = ResampledPlan(sizes.sizes, weights=weights, seed=args.seed)
    else:
        plan = ShardPlan(sizes.sizes, seed=args.seed)
    num_samples = args.train_num_samples
    if num_samples is None:
        num_samples = sum(sizes.sizes)
    elif num_samples < 1:
        raise ValueError(f"--train-num-samples must be >= 1, got {num_samples}")
    return PlannedData(ShardSource(shards), plan, num_samples, sizes.failures)


def plan_validation(
    args: argparse.Namespace, kind: DatasetKind, transform: Callable
) -> PlannedData:
    """Return the samples of `--val-data`, in order; see `plan_training`."""
    if kind == "csv":
        table = read_table(args, args.val_data)
        return PlannedData(TableSource(table), OrderedPlan([len(table)]), len(table))
    if kind == "synthetic":
        num_samples = args.val_num_samples
        return _blank_data(
            args.train_num_samples if num_samples is None else num_samples, transform
        )
    shards = expand_shards(args.val_data)
    # Each sample counts in a measurement, whatever is stated beside the shards.
    sizes = size_shards(shards, use_stated=False)
    return PlannedData(
        ShardSource(shards), OrderedPlan(sizes.sizes), sum(sizes.sizes), sizes.failures
    )


def read_table(args: argparse.Namespace, path: str) -> PairTable:
    """Read a table by the names of its columns; see `read_pairs`."""
    return read_pairs(
        Path(path),
        image_key=args.csv_img_key,
        caption_key=args.csv_caption_key,
        separator=args.csv_separator,
    )


def _blank_data(num_samples: int | None, transform: Callable) -> PlannedData:
    if num_samples is None or num_samples < 1:
        raise ValueError(
            f"--dataset-type synthetic needs --train-num-samples >= 1, got {num_samples}"
        )
    return PlannedData(BlankSource(_image_size(transform)), OrderedPlan([num_samples]), num_samples)


def _image_size(transform: Callable) -> tuple[int, int]:
    """Return the (height, width) that a transform's first sized step makes."""
    for step in getattr(transform, "transforms", []):
        size = getattr(step, "size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and size:
            return size[0], size[-1]
    raise ValueError("--dataset-type synthetic needs a transform with a step that has a size")
