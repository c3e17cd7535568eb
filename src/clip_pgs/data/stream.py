"""The loaders of a training run, from OpenCLIP's data flags.

Every flag keeps its meaning. Deliberate differences: order and augmentation are a function of
`--seed`, epoch, rank and number of workers; a worker fills a batch from the next pass over its
share instead of dropping the rest; pairs without words and bad rows of a table are skipped; more
workers than the data can feed are a warning.
"""

from __future__ import annotations

import argparse
import logging
import math
from pathlib import Path
from typing import Literal

from clip_pgs.data.batches import BatchDataset
from clip_pgs.data.loader import SampleStream
from clip_pgs.data.samples import SampleDecoder, Tokenize, Transform
from clip_pgs.data.shards import count_samples, expand_shards, upsampling_weights
from clip_pgs.data.sources import (
    BlankSource,
    OrderedShardSource,
    ResampledShardSource,
    ShardSource,
    Source,
    TableSource,
)
from clip_pgs.data.tables import read_pairs
from clip_pgs.data.text_masking import create_text_masking

logger = logging.getLogger(__name__)

DatasetKind = Literal["webdataset", "csv", "synthetic"]


def dataset_kind(dataset_type: str, path: str | None, *, flag: str) -> DatasetKind:
    """Return the kind of data that `--dataset-type` and a path mean.

    Args:
        dataset_type: "webdataset", "csv", "synthetic", or "auto" to judge by the path.
        path: The value of `flag`; may be None for synthetic data alone.
        flag: "--train-data" or "--val-data", for messages.

    Raises:
        ValueError: If there is no path, or "auto" cannot tell.
    """
    if dataset_type == "synthetic":
        return "synthetic"
    if not path:
        raise ValueError(
            f"{flag} is missing; name shards, a table, or use --dataset-type synthetic"
        )
    if dataset_type == "webdataset":
        return "webdataset"
    if dataset_type == "csv" or path.lower().endswith((".csv", ".tsv")):
        return "csv"
    if ".tar" in path.lower():
        return "webdataset"
    raise ValueError(
        f"{flag} {path!r} ends neither in .tar nor in .csv or .tsv; "
        "say which it is with --dataset-type webdataset or csv"
    )


def build_train_stream(
    args: argparse.Namespace,
    *,
    transform: Transform,
    tokenize: Tokenize,
    rank: int,
    world_size: int,
) -> SampleStream:
    """Build the loader of `--train-data`.

    Args:
        args: OpenCLIP's options: `train_data`, `dataset_type`, `dataset_resampled`,
            `train_data_upsampling_factors`, `train_num_samples`, `csv_*`, `batch_size`,
            `workers`, `seed`; and ours: `text_masking`, `text_tokens`, `text_masking_options`.
        transform: RGB image to a float tensor of shape (3, H, W).
        tokenize: The model's tokenizer: B captions to a long tensor (B, context length).
        rank: This process, in [0, world_size).
        world_size: Number of processes.

    Returns:
        A stream with the same number of full batches on each rank. Its `num_samples` counts what
        an epoch really gives. Its texts have `text_tokens` tokens, if that is set.

    Raises:
        ValueError: If the options name no data, or data that cannot feed `world_size` processes,
            or a text masking that is not possible.
    """
    kind = dataset_kind(args.dataset_type, args.train_data, flag="--train-data")
    if args.train_data_upsampling_factors is not None and not args.dataset_resampled:
        raise ValueError("--train-data-upsampling-factors needs --dataset-resampled")

    shorten = create_text_masking(
        args.text_masking,
        tokenizer=tokenize,
        num_tokens=args.text_tokens,
        **args.text_masking_options,
    )

    global_batch = args.batch_size * world_size
    if kind == "webdataset":
        source, num_samples, num_workers = _train_shards(args, world_size)
        # OpenCLIP's rounding: up, and every worker of every rank makes as many batches.
        num_loaders = max(1, num_workers)
        num_batches = math.ceil(math.ceil(num_samples / global_batch) / num_loaders) * num_loaders
    else:
        source, num_samples = _row_source(args, kind, transform, is_train=True)
        num_batches = math.ceil(num_samples / world_size) // args.batch_size
        if num_batches == 0:
            raise ValueError(
                f"{num_samples} training samples do not fill a batch of {global_batch}: "
                f"--batch-size {args.batch_size} on {world_size} processes"
            )
        num_workers = min(args.workers, num_batches)

    dataset = BatchDataset(
        source,
        SampleDecoder(transform, shorten, args.seed),
        batch_size=args.batch_size,
        num_batches=num_batches,
        rank=rank,
        world_size=world_size,
    )
    return SampleStream(
        dataset,
        num_workers=num_workers,
        num_samples=num_batches * global_batch,
        num_batches=num_batches,
    )


def build_val_stream(
    args: argparse.Namespace, *, transform: Transform, tokenize: Tokenize
) -> SampleStream:
    """Build the loader of `--val-data`: every sample once, in order, for one process.

    Args:
        args: OpenCLIP's options: `val_data`, `dataset_type`, `val_num_samples`, `csv_*`,
            `batch_size`, `workers`, `seed`; synthetic data falls back to `train_num_samples`.
        transform: RGB image to a float tensor of shape (3, H, W).
        tokenize: List of B captions to a long tensor of shape (B, T).

    Returns:
        A stream whose batches may be partial. Its `num_samples` and `num_batches` are what the
        options or the files beside the shards state, None where they state nothing; they do
        not limit it.

    Raises:
        ValueError: If the options name no data.
    """
    kind = dataset_kind(args.dataset_type, args.val_data, flag="--val-data")
    num_samples: int | None
    if kind == "webdataset":
        shards = expand_shards(args.val_data)
        num_samples = args.val_num_samples or count_samples(shards)
        source: Source = OrderedShardSource(shards, batch_size=args.batch_size)
    else:
        source, num_samples = _row_source(args, kind, transform, is_train=False)
    num_batches = None if num_samples is None else math.ceil(num_samples / args.batch_size)

    dataset = BatchDataset(
        source,
        SampleDecoder(transform, tokenize, args.seed),
        batch_size=args.batch_size,
        num_batches=None,
        rank=0,
        world_size=1,
    )
    return SampleStream(
        dataset,
        num_workers=args.workers if num_batches is None else min(args.workers, num_batches),
        num_samples=num_samples,
        num_batches=num_batches,
    )


def _train_shards(args: argparse.Namespace, world_size: int) -> tuple[Source, int, int]:
    """Return the source, the samples of an epoch and the number of workers."""
    shards = expand_shards(args.train_data)
    num_samples = args.train_num_samples
    if num_samples is None:
        num_samples = count_samples(shards)
    if num_samples is None:
        raise ValueError(
            f"the number of samples in {args.train_data!r} is not known; give "
            "--train-num-samples (`python -m clip_pgs.data check` counts them)"
        )
    if num_samples < 1:
        raise ValueError(f"--train-num-samples must be >= 1, got {num_samples}")

    if args.dataset_resampled:
        factors = args.train_data_upsampling_factors
        weights = None if factors is None else upsampling_weights(args.train_data, factors)
        return (
            ResampledShardSource(shards, weights=weights, seed=args.seed),
            num_samples,
            args.workers,
        )

    if len(shards) < world_size:
        raise ValueError(
            f"{len(shards)} shards cannot feed {world_size} processes; each needs one of its own "
            "(or --dataset-resampled)"
        )
    # A worker with less than one batch of its own would repeat samples within a batch.
    num_full_batches = max(1, num_samples // (args.batch_size * world_size))
    num_workers = min(args.workers, len(shards) // world_size, num_full_batches)
    if num_workers < args.workers:
        logger.warning(
            "%d workers per process instead of --workers %d: %d shards with %d samples on %d "
            "processes feed no more",
            num_workers,
            args.workers,
            len(shards),
            num_samples,
            world_size,
        )
    return ShardSource(shards, seed=args.seed), num_samples, num_workers


def _row_source(
    args: argparse.Namespace, kind: DatasetKind, transform: Transform, *, is_train: bool
) -> tuple[Source, int]:
    """Return the source of a table or of synthetic data, and its number of samples."""
    if kind == "csv":
        table = read_pairs(
            Path(args.train_data if is_train else args.val_data),
            image_key=args.csv_img_key,
            caption_key=args.csv_caption_key,
            separator=args.csv_separator,
        )
        source = TableSource(table, batch_size=args.batch_size, seed=args.seed, shuffle=is_train)
        return source, len(table)

    num_samples = args.train_num_samples
    if not is_train and args.val_num_samples is not None:
        num_samples = args.val_num_samples
    if num_samples is None or num_samples < 1:
        raise ValueError(
            f"--dataset-type synthetic needs --train-num-samples >= 1, got {num_samples}"
        )
    blank = BlankSource(_image_size(transform), num_rows=num_samples, batch_size=args.batch_size)
    return blank, num_samples


def _image_size(transform: Transform) -> tuple[int, int]:
    """Return the (height, width) that a transform's first sized step makes."""
    for step in getattr(transform, "transforms", []):
        size = getattr(step, "size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and size:
            return size[0], size[-1]
    raise ValueError("--dataset-type synthetic needs a transform with a step that has a size")
