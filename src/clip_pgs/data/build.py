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
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from clip_pgs.data.bad_samples import OnSkip, Skip, SkipAccount
from clip_pgs.data.batches import Batching, PlannedBatches, Source
from clip_pgs.data.caption_tables import PairTable, TableSource, is_tar, list_images, read_pairs
from clip_pgs.data.decoding import RandomCrop, faster_transform
from clip_pgs.data.loader import SampleStream
from clip_pgs.data.order import (
    EpochPlan,
    OrderedPlan,
    ResampledPlan,
    RowPlan,
    SampleRef,
    ShardPlan,
)
from clip_pgs.data.samples import RawSample, SampleDecoder, Tokenize, Transform
from clip_pgs.data.shards import (
    count_earlier,
    count_samples,
    expand_shards,
    folder_of_shards,
    is_seekable,
    upsampling_weights,
)
from clip_pgs.data.streaming import StreamingBatches
from clip_pgs.data.tar import ShardSource, index_shards, misstated_sizes, size_shards
from clip_pgs.data.text_masking import create_text_masking

logger = logging.getLogger(__name__)

DatasetKind = Literal["webdataset", "csv", "synthetic"]


def dataset_kind(dataset_type: str, path: str | None, *, flag: str) -> DatasetKind:
    """Return the kind of data that `--dataset-type` and a path mean; a folder is a table.

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
    if dataset_type == "csv" or path.lower().endswith((".csv", ".tsv")) or os.path.isdir(path):
        return "csv"
    if ".tar" in path.lower():
        return "webdataset"
    raise ValueError(
        f"{flag} {path!r} is no folder, and ends neither in .tar nor in .csv or .tsv; "
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
            `max_bad_share` (None allows any), `mae` (None where captions are needed).
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
        ValueError: If the options name no data, or a text masking that is not possible. Whether the
            data fills a step and feeds each process is checked before, by the checks of a run.
        UnusableDataError: If the shards hold no sample at all.
    """
    kind = dataset_kind(args.dataset_type, args.train_data, flag="--train-data")
    shorten = create_text_masking(
        args.text_masking,
        tokenizer=tokenize,
        num_tokens=args.text_tokens,
        **args.text_masking_options,
    )
    decode = SampleDecoder(
        faster_transform(transform),
        shorten,
        args.seed,
        _caption_key(args, kind),
        with_captions=args.mae is None,
    )
    batching = Batching(args.batch_size, args.accum_freq, rank, world_size)
    batches, failures = _make_batches(args, kind, args.train_data, decode, batching)
    account = SkipAccount(
        on_skip=on_skip,
        max_bad_share=args.max_bad_share,
        epoch_size=(batches.num_batches or 0) * args.batch_size,
    )
    account.add(failures if rank == 0 else [], num_tried=0)
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
        UnusableDataError: If the shards hold no sample at all.
    """
    kind = dataset_kind(args.dataset_type, args.val_data, flag="--val-data")
    decode = SampleDecoder(transform, tokenize, args.seed, _caption_key(args, kind))
    batching = Batching(args.batch_size, per_step=None)
    batches, failures = _make_batches(args, kind, args.val_data, decode, batching)
    account = SkipAccount()
    account.add(failures, num_tried=0)
    return SampleStream(batches, account, timeout=args.data_timeout)


def read_table(args: argparse.Namespace, path: str) -> PairTable:
    """Read a table by the names of its columns, or list a folder of images without captions.

    Raises:
        ValueError: See `read_pairs` and `list_images`; or if captions are needed; or if it is a
            shard, or a folder of shards.
    """
    if os.path.isdir(path):
        if args.mae is None:
            raise ValueError(
                folder_of_shards(Path(path))
                or f"{path!r} is a folder, whose images have no captions; a masked autoencoder "
                "alone trains without (clip-pgs mae)"
            )
        return list_images(Path(path))
    if os.path.isfile(path) and is_tar(Path(path)):
        raise ValueError(f"{path!r} is a tar archive; for a shard write --dataset-type webdataset")
    return read_pairs(
        Path(path),
        image_key=args.csv_img_key,
        caption_key=args.csv_caption_key,
        separator=args.csv_separator,
        separator_flag="--csv-separator",
    )


def _caption_key(args: argparse.Namespace, kind: DatasetKind) -> str | None:
    return args.caption_key if kind == "webdataset" else None


def _make_batches(
    args: argparse.Namespace,
    kind: DatasetKind,
    path: str,
    decode: SampleDecoder,
    batching: Batching,
) -> tuple[PlannedBatches | StreamingBatches, list[Skip]]:
    """Return batches to train on, shuffled, or to measure on, in order; and what shards are bad."""
    trains = batching.per_step is not None
    num_samples = args.train_num_samples if trains else args.val_num_samples
    source: Source
    failures: list[Skip] = []
    if kind == "csv":
        source = TableSource(read_table(args, path))
        num_samples = len(source.table)
        plan: EpochPlan = OrderedPlan([num_samples])
        if trains:
            plan = RowPlan(num_samples, seed=args.seed)
    elif kind == "synthetic":
        source = _BlankSource(_image_size(decode.transform))
        num_samples = num_samples or args.train_num_samples
        plan = OrderedPlan([num_samples])
    else:
        shards = expand_shards(path)
        weights, resampled = None, trains and args.dataset_resampled
        if resampled and args.train_data_upsampling_factors is not None:
            weights = upsampling_weights(path, args.train_data_upsampling_factors)
        if not all(map(is_seekable, shards)):
            streaming = StreamingBatches(
                shards,
                decode,
                batching,
                num_samples=num_samples or count_samples(shards),
                num_workers=args.workers,
                resampled=resampled,
                weights=weights,
            )
            return streaming, []
        held: dict[str, int] = {}
        if trains:
            start = len(shards) * batching.rank // batching.world_size
            held = {shard: each[0] for shard, each in index_shards(shards, start=start).items()}
        # In a measurement each sample counts, whatever is stated beside the shards.
        sizes, failures = size_shards(shards, use_stated=trains)
        odd = misstated_sizes(dict(zip(shards, sizes, strict=True)), held)
        if odd and batching.rank == 0:
            _warn_once(odd)
        plan = OrderedPlan(sizes)
        if resampled:
            plan = ResampledPlan(sizes, weights=weights, seed=args.seed)
        elif trains:
            plan = ShardPlan(sizes, seed=args.seed, num_earlier=count_earlier(shards))
        if num_samples is None or not trains:
            num_samples = sum(sizes)
        if plan.num_samples == 0:
            account = SkipAccount()
            account.add(failures, num_tried=0)
            raise account.no_usable_sample([])
        source = ShardSource(shards, use_json=decode.caption_key is not None)
    planned = PlannedBatches(
        source, plan, decode, batching, num_samples=num_samples, num_workers=args.workers
    )
    return planned, failures


# Each phase of a run builds a stream.
@lru_cache
def _warn_once(text: str) -> None:
    logger.warning("%s", text)


def _image_size(transform: Any) -> tuple[int, int]:
    """Return the (height, width) that a transform's first sized step makes."""
    steps = [transform.crop] if isinstance(transform, RandomCrop) else transform.transforms
    size = next(step.size for step in steps if hasattr(step, "size"))
    return (size, size) if isinstance(size, int) else (size[0], size[-1])


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
