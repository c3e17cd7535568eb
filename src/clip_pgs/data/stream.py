"""The loaders of a training run, from OpenCLIP's data flags.

Every flag keeps its meaning. Deliberate differences: the order is a function of `--seed` and the
epoch alone, augmentation of these and the sample; an epoch is as many whole steps as its samples
fill; another sample takes the place of a bad one; local shards are counted where nothing states
their samples. Shards that can only be read from the beginning (URLs, commands, compressed files)
are dealt to processes and workers, as OpenCLIP deals them all.
"""

from __future__ import annotations

import argparse
import math

from clip_pgs.data.bad_samples import OnSkip, SkipAccount
from clip_pgs.data.batches import BatchPositions, PlannedBatches
from clip_pgs.data.captions.text_masking import create_text_masking
from clip_pgs.data.decoding import faster_transform
from clip_pgs.data.loader import SampleStream
from clip_pgs.data.planned_data import DatasetKind, PlannedData, plan_training, plan_validation
from clip_pgs.data.samples import SampleDecoder, Tokenize, Transform
from clip_pgs.data.sequential.sequential_batches import SequentialBatches
from clip_pgs.data.sequential.sequential_data import (
    count_sequential,
    num_sequential_workers,
    sequential_source,
)
from clip_pgs.data.sequential.sequential_sources import OrderedShards
from clip_pgs.data.tar.shards import count_samples, expand_shards, is_seekable
from clip_pgs.data.whereabouts import Whereabouts


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
    on_skip: OnSkip | None = None,
) -> SampleStream:
    """Build the loader of `--train-data`.

    Args:
        args: OpenCLIP's options: `train_data`, `dataset_type`, `dataset_resampled`,
            `train_data_upsampling_factors`, `train_num_samples`, `csv_*`, `batch_size`,
            `accum_freq`, `workers`, `seed`; and ours: `text_masking`, `text_tokens`,
            `text_masking_options`, `data_timeout` (seconds; 0 waits for ever), `max_bad_share`
            (None allows any).
        transform: RGB image to a float tensor of shape (3, H, W).
        tokenize: The model's tokenizer: B captions to a long tensor (B, context length).
        rank: This process, in [0, world_size).
        world_size: Number of processes.
        on_skip: Is told each sample of this process, and on rank 0 each shard, that is bad.

    Returns:
        A stream with the same number of full batches on each rank, in whole steps. Its
        `num_samples` counts what an epoch really gives. Its texts have `text_tokens` tokens, if
        that is set. Its images are bytes where `pixel_normalizer` says so, which is what to put
        behind it; else floats, as `transform` makes them.

    Raises:
        ValueError: If the options name no data, or data that does not fill a step or cannot feed
            `world_size` processes, or a text masking that is not possible.
        NoUsableSampleError: If the shards hold no sample at all.
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
    decode = SampleDecoder(faster_transform(transform), shorten, args.seed)

    if _is_seekable(kind, args.train_data):
        data = plan_training(args, kind, transform)
        _require_samples(data)
        num_batches = _num_batches(args, data.num_samples, world_size=world_size)
        account = _training_account(args, on_skip, num_batches=num_batches)
        if rank == 0:
            account.add(data.failures, num_tried=0)
        positions = BatchPositions(
            data.num_samples,
            batch_size=args.batch_size,
            num_per_step=args.accum_freq,
            rank=rank,
            world_size=world_size,
        )
        num_workers = min(args.workers, num_batches)
        batches: PlannedBatches | SequentialBatches = PlannedBatches(
            data.source, data.plan, decode, positions, Whereabouts(num_workers), refill=True
        )
    else:
        source = sequential_source(args, world_size=world_size)
        num_batches = _num_batches(args, count_sequential(args), world_size=world_size)
        account = _training_account(args, on_skip, num_batches=num_batches)
        num_workers = num_sequential_workers(
            args, num_shards=len(source.shards), num_batches=num_batches, world_size=world_size
        )
        batches = SequentialBatches(
            source,
            decode,
            Whereabouts(num_workers),
            batch_size=args.batch_size,
            batches_per_epoch=num_batches,
            batches_per_step=args.accum_freq,
            rank=rank,
            world_size=world_size,
        )
    return SampleStream(
        batches,
        account,
        num_workers=num_workers,
        num_samples=num_batches * args.batch_size * world_size,
        num_batches=num_batches,
        timeout=args.data_timeout,
    )


def build_val_stream(
    args: argparse.Namespace, *, transform: Transform, tokenize: Tokenize
) -> SampleStream:
    """Build the loader of `--val-data`: every usable sample once, in order, for one process.

    Args:
        args: OpenCLIP's options: `val_data`, `dataset_type`, `val_num_samples`, `csv_*`,
            `batch_size`, `workers`, `seed`, and our `data_timeout`; synthetic data falls back to
            `train_num_samples`.
        transform: RGB image to a float tensor of shape (3, H, W).
        tokenize: List of B captions to a long tensor of shape (B, T).

    Returns:
        A stream whose batches may be partial. Its `num_samples` and `num_batches` are None
        where shards cannot be counted and nothing states them.

    Raises:
        ValueError: If the options name no data.
        NoUsableSampleError: If the shards hold no sample at all.
    """
    kind = dataset_kind(args.dataset_type, args.val_data, flag="--val-data")
    decode = SampleDecoder(transform, tokenize, args.seed)
    account = SkipAccount()
    num_samples: int | None
    if _is_seekable(kind, args.val_data):
        data = plan_validation(args, kind, transform)
        _require_samples(data)
        account.add(data.failures, num_tried=0)
        num_samples = data.num_samples
        positions = BatchPositions(num_samples, batch_size=args.batch_size, num_per_step=None)
        num_workers = min(args.workers, len(positions))
        batches: PlannedBatches | SequentialBatches = PlannedBatches(
            data.source, data.plan, decode, positions, Whereabouts(num_workers), refill=False
        )
    else:
        shards = expand_shards(args.val_data)
        num_samples = args.val_num_samples or count_samples(shards)
        num_workers = args.workers
        batches = SequentialBatches(
            OrderedShards(shards, batch_size=args.batch_size),
            decode,
            Whereabouts(num_workers),
            batch_size=args.batch_size,
            batches_per_epoch=None,
        )
    return SampleStream(
        batches,
        account,
        num_workers=num_workers,
        num_samples=num_samples,
        num_batches=None if num_samples is None else math.ceil(num_samples / args.batch_size),
        timeout=args.data_timeout,
    )


def _is_seekable(kind: DatasetKind, path: str) -> bool:
    return kind != "webdataset" or all(map(is_seekable, expand_shards(path)))


def _require_samples(data: PlannedData) -> None:
    if data.plan.num_samples == 0:
        account = SkipAccount()
        account.add(data.failures, num_tried=0)
        raise account.no_usable_sample([])


def _num_batches(args: argparse.Namespace, num_samples: int, *, world_size: int) -> int:
    """Return the batches of each rank in the whole steps of an epoch."""
    samples_per_step = args.batch_size * args.accum_freq * world_size
    num_steps = num_samples // samples_per_step
    if num_steps == 0:
        raise ValueError(
            f"{num_samples} training samples do not fill one step of {samples_per_step}: "
            f"--batch-size {args.batch_size} x --accum-freq {args.accum_freq} x {world_size} "
            "processes"
        )
    return num_steps * args.accum_freq


def _training_account(
    args: argparse.Namespace, on_skip: OnSkip | None, *, num_batches: int
) -> SkipAccount:
    return SkipAccount(
        on_skip=on_skip,
        max_bad_share=args.max_bad_share,
        epoch_size=num_batches * args.batch_size,
    )
