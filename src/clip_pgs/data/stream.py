"""The loaders of a training run, from OpenCLIP's data flags.

Every flag keeps its meaning. Deliberate differences: the order is a function of `--seed` and the
epoch alone, augmentation of these and the sample; an epoch is as many whole steps as its samples
fill; another sample takes the place of a bad one; local shards are counted where nothing states
their samples. Shards that can only be read from the beginning (URLs, commands, compressed files)
are dealt to processes and workers, as OpenCLIP deals them all.
"""

from __future__ import annotations

import argparse
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import Image

from clip_pgs.data.batches import Batching, PlannedBatches, Source
from clip_pgs.data.decoding import faster_transform
from clip_pgs.data.loader import SampleStream
from clip_pgs.data.plan import (
    EpochPlan,
    OrderedPlan,
    ResampledPlan,
    RowPlan,
    SampleRef,
    ShardPlan,
)
from clip_pgs.data.samples import RawSample, SampleDecoder, Tokenize, Transform
from clip_pgs.data.shards import count_samples, expand_shards, is_seekable, upsampling_weights
from clip_pgs.data.skips import OnSkip, Skip, SkipAccount
from clip_pgs.data.streaming import StreamingBatches, StreamingSource, check_enough_shards
from clip_pgs.data.tables import PairTable, TableSource, read_pairs
from clip_pgs.data.tar import ShardSource, index_shards, size_shards
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
    on_skip: OnSkip | None = None,
) -> SampleStream:
    """Build the loader of `--train-data`.

    Args:
        args: OpenCLIP's options: `train_data`, `dataset_type`, `dataset_resampled`,
            `train_data_upsampling_factors`, `train_num_samples`, `csv_*`, `batch_size`,
            `accum_freq`, `workers`, `seed`; and ours: `caption_key`, `text_masking`,
            `text_tokens`, `text_masking_options`, `data_timeout` (seconds; 0 waits for ever),
            `max_bad_share` (None allows any).
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
    decode = SampleDecoder(
        faster_transform(transform), shorten, args.seed, _caption_key(args, kind)
    )
    batching = Batching(args.batch_size, args.accum_freq, rank, world_size)
    failures: list[Skip] = []
    batches: PlannedBatches | StreamingBatches
    if _is_indexed(kind, args.train_data):
        data = _indexed_data(args, kind, transform, trains=True)
        if isinstance(data.source, ShardSource):
            shards = data.source.shards
            index_shards(shards, start=len(shards) * rank // world_size)
        failures = data.failures if rank == 0 else []
        _check_one_step(args, data.num_samples, world_size)
        batches = PlannedBatches(
            data.source,
            data.plan,
            decode,
            batching,
            num_samples=data.num_samples,
            num_workers=args.workers,
        )
    else:
        source = _streaming_source(args, world_size)
        num_samples = _stated_samples(args)
        _check_one_step(args, num_samples, world_size)
        num_workers = _num_streaming_workers(
            args, source, batching.num_batches(num_samples), world_size
        )
        batches = StreamingBatches(
            source, decode, batching, num_samples=num_samples, num_workers=num_workers
        )
    account = SkipAccount(
        on_skip=on_skip,
        max_bad_share=args.max_bad_share,
        epoch_size=(batches.num_batches or 0) * args.batch_size,
    )
    account.add(failures, num_tried=0)
    return SampleStream(batches, account, timeout=args.data_timeout)


def build_val_stream(
    args: argparse.Namespace, *, transform: Transform, tokenize: Tokenize
) -> SampleStream:
    """Build the loader of `--val-data`: every usable sample once, in order, for one process.

    Args:
        args: OpenCLIP's options: `val_data`, `dataset_type`, `val_num_samples`, `csv_*`,
            `batch_size`, `workers`, `seed`, and our `caption_key` and `data_timeout`; synthetic
            data falls back to `train_num_samples`.
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
    decode = SampleDecoder(transform, tokenize, args.seed, _caption_key(args, kind))
    batching = Batching(args.batch_size, per_step=None)
    account = SkipAccount()
    batches: PlannedBatches | StreamingBatches
    if _is_indexed(kind, args.val_data):
        data = _indexed_data(args, kind, transform, trains=False)
        account.add(data.failures, num_tried=0)
        batches = PlannedBatches(
            data.source,
            data.plan,
            decode,
            batching,
            num_samples=data.num_samples,
            num_workers=args.workers,
        )
    else:
        shards = expand_shards(args.val_data)
        batches = StreamingBatches(
            StreamingSource(shards, "ordered", use_json=bool(args.caption_key)),
            decode,
            batching,
            num_samples=args.val_num_samples or count_samples(shards),
            num_workers=args.workers,
        )
    return SampleStream(batches, account, timeout=args.data_timeout)


def read_table(args: argparse.Namespace, path: str) -> PairTable:
    """Read a table by the names of its columns; see `read_pairs`."""
    return read_pairs(
        Path(path),
        image_key=args.csv_img_key,
        caption_key=args.csv_caption_key,
        separator=args.csv_separator,
    )


def _caption_key(args: argparse.Namespace, kind: DatasetKind) -> str | None:
    return args.caption_key if kind == "webdataset" else None


def _is_indexed(kind: DatasetKind, path: str) -> bool:
    return kind != "webdataset" or all(map(is_seekable, expand_shards(path)))


def _check_one_step(args: argparse.Namespace, num_samples: int, world_size: int) -> None:
    needed = args.batch_size * args.accum_freq * world_size
    if num_samples < needed:
        raise ValueError(
            f"{num_samples} training samples do not fill one step of {needed}: "
            f"--batch-size {args.batch_size} x --accum-freq {args.accum_freq} x {world_size} "
            "processes"
        )


@dataclass(frozen=True)
class _IndexedData:
    source: Source
    plan: EpochPlan
    num_samples: int  # of an epoch, whether or not the plan has as many
    failures: list[Skip]  # of whole shards


def _indexed_data(
    args: argparse.Namespace, kind: DatasetKind, transform: Callable, *, trains: bool
) -> _IndexedData:
    """Return data to train on, shuffled, or to measure on, in order."""
    path = args.train_data if trains else args.val_data
    if kind == "csv":
        table = read_table(args, path)
        plan: EpochPlan = OrderedPlan([len(table)])
        if trains:
            plan = RowPlan(len(table), seed=args.seed)
        return _IndexedData(TableSource(table), plan, len(table), [])
    num_samples = args.train_num_samples
    if kind == "synthetic":
        if not trains and args.val_num_samples is not None:
            num_samples = args.val_num_samples
        if num_samples is None or num_samples < 1:
            raise ValueError(
                f"--dataset-type synthetic needs --train-num-samples >= 1, got {num_samples}"
            )
        source = _BlankSource(_image_size(transform))
        return _IndexedData(source, OrderedPlan([num_samples]), num_samples, [])

    shards = expand_shards(path)
    # In a measurement each sample counts, whatever is stated beside the shards.
    sizes, failures = size_shards(shards, use_stated=trains)
    if not trains:
        plan = OrderedPlan(sizes)
    elif args.dataset_resampled:
        plan = ResampledPlan(sizes, weights=_shard_weights(args), seed=args.seed)
    else:
        plan = ShardPlan(sizes, seed=args.seed)
    if num_samples is None or not trains:
        num_samples = sum(sizes)
    elif num_samples < 1:
        raise ValueError(f"--train-num-samples must be >= 1, got {num_samples}")
    if plan.num_samples == 0:
        account = SkipAccount()
        account.add(failures, num_tried=0)
        raise account.no_usable_sample([])
    shard_source = ShardSource(shards, use_json=bool(args.caption_key))
    return _IndexedData(shard_source, plan, num_samples, failures)


def _shard_weights(args: argparse.Namespace) -> list[float] | None:
    factors = args.train_data_upsampling_factors
    return None if factors is None else upsampling_weights(args.train_data, factors)


def _image_size(transform: Callable) -> tuple[int, int]:
    """Return the (height, width) that a transform's first sized step makes."""
    for step in getattr(transform, "transforms", []):
        size = getattr(step, "size", None)
        if isinstance(size, int):
            return size, size
        if isinstance(size, (tuple, list)) and size:
            return size[0], size[-1]
    raise ValueError("--dataset-type synthetic needs a transform with a step that has a size")


class _BlankSource:
    """Black images of (height, width) with one caption, to measure training without data."""

    def __init__(self, size: tuple[int, int]) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", size[::-1]).save(buffer, format="PNG")
        self.image = buffer.getvalue()

    def read(self, ref: SampleRef) -> RawSample | Skip:
        """Return the one sample there is."""
        number = str(ref.number)
        return RawSample("synthetic", number, self.image, (b"Dummy caption",), ref.repeat)

    def describe(self, shard: int, number: int) -> str:
        """Return the number of the sample."""
        return f"synthetic: {number}"


def _streaming_source(args: argparse.Namespace, world_size: int) -> StreamingSource:
    shards, use_json = expand_shards(args.train_data), bool(args.caption_key)
    if args.dataset_resampled:
        return StreamingSource(shards, "resampled", args.seed, _shard_weights(args), use_json)
    check_enough_shards(len(shards), world_size)
    return StreamingSource(shards, "shuffled", args.seed, use_json=use_json)


def _stated_samples(args: argparse.Namespace) -> int:
    """Return the samples of an epoch of `--train-data`, as they are stated."""
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


def _num_streaming_workers(
    args: argparse.Namespace, source: StreamingSource, num_batches: int, world_size: int
) -> int:
    """Return as many workers as the shards can feed; say so where that is fewer than asked for."""
    # A worker with less than one batch of its own would repeat samples within a batch.
    num_workers = min(args.workers, num_batches)
    if not args.dataset_resampled:
        num_workers = min(num_workers, len(source.shards) // world_size)
    if num_workers < args.workers:
        logger.warning(
            "%d workers per process instead of --workers %d: %d shards with %d batches per "
            "process feed no more",
            num_workers,
            args.workers,
            len(source.shards),
            num_batches,
        )
    return num_workers
