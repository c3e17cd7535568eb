"""Look at the data before a run begins: is it there, can it be read, is there enough of it."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain, islice
from typing import TypeVar

from clip_pgs.common import explained
from clip_pgs.data.bad_samples import (
    BadSampleError,
    Skip,
    StalledDataError,
    UnusableDataError,
    describe_reasons,
)
from clip_pgs.data.build import dataset_kind, read_table
from clip_pgs.data.caption_tables import TableSource, listed_captions, repeated_images
from clip_pgs.data.decoding import time_limit
from clip_pgs.data.order import SampleRef
from clip_pgs.data.samples import (
    RawSample,
    caption_fields,
    decode_captions,
    decode_image,
    missing_fields,
)
from clip_pgs.data.shards import expand_shards, is_remote, is_seekable
from clip_pgs.data.tar import (
    index_shards,
    misstated_sizes,
    read_shard,
    size_shards,
    unreadable_shard,
)

T = TypeVar("T")

_NUM_READERS = 8
# Of thousands of shards, all are opened, but only so many are read in.
_MAX_DECODED = 64
_MAX_COUNTED = 8
# A shard's first pair may be bad where the second is good.
_PAIRS_PER_SHARD = 3
_REMOTE_SECONDS = 60.0


# Whether a usable sample was found at a place, and what is wrong there.
_Look = tuple[bool, list[Skip]]


def preflight(args: argparse.Namespace) -> list[str]:
    """Look at `--train-data` and `--val-data` without reading them through.

    Patterns are expanded, every local shard is opened, and of up to 64 of them, spread evenly,
    a sample is decoded.

    Args:
        args: The options that `build_train_stream` takes; both paths may be None.

    Returns:
        A sentence for each thing that is odd and does not stop a run.

    Raises:
        ValueError: In one sentence, if a path names nothing, nothing that was tried can be used
            (it names what is missing).
    """
    warnings = []
    if args.caption_key is not None:
        caption_fields(args.caption_key)
    for flag, path in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        if path is None:
            continue
        kind = dataset_kind(args.dataset_type, path, flag=flag)
        with explained(flag):
            if kind == "csv":
                table = read_table(args, path)
                warnings += _judge(_look_at_rows(TableSource(table), args), flag)
                if args.mae is None and (odd := listed_captions(table)):
                    warnings.append(f"{flag}: {odd}")
                if flag == "--val-data" and args.mae is None and (odd := repeated_images(table)):
                    warnings.append(
                        f"{flag}: {odd}, and one row alone counts for a caption, so that R@k is "
                        "lower than with a row for each image; --eval-suite zeroshot-retrieval "
                        "measures images with several captions"
                    )
            elif kind == "webdataset":
                shards = expand_shards(path)
                found: Counter[str] = Counter()
                warnings += _judge(_look_at_shards(shards, args, found), flag)
                if odd := missing_fields(args.caption_key, found):
                    warnings.append(f"{flag}: {odd}")
                if flag == "--train-data" and all(map(is_seekable, shards)):
                    warnings += _check_amount(args, shards)
    return warnings


def _look_at_rows(source: TableSource, args: argparse.Namespace) -> list[_Look]:
    rows = _spread(len(source.table), _MAX_DECODED)
    look = partial(_look, caption_key=None, found=None, with_captions=args.mae is None)
    return _look_at(rows, lambda row: [source.read(SampleRef(0, row))], look)


def _look_at_shards(
    shards: list[str], args: argparse.Namespace, found: Counter[str]
) -> list[_Look]:
    caption_key = args.caption_key
    local = [shard for shard in shards if not is_remote(shard)]
    chosen = {local[index] for index in _spread(len(local), _MAX_DECODED)}
    with_captions = args.mae is None
    look = partial(_look, caption_key=caption_key, found=found, with_captions=with_captions)

    def read(shard: str) -> Iterable[RawSample | Skip]:
        items = islice(read_shard(shard, use_json=caption_key is not None), _PAIRS_PER_SHARD)
        # The first is read at once, others where it is bad.
        return chain([next(items)], items)

    def open_only(shard: str) -> list[Skip]:
        try:
            with open(shard, "rb") as file:
                return [] if os.read(file.fileno(), 1) else [Skip(shard, "", "empty shard")]
        except OSError as error:
            return [unreadable_shard(shard, error)]

    looks = _look_at(sorted(chosen), read, look)
    with ThreadPoolExecutor(_NUM_READERS) as executor:
        opened = executor.map(open_only, (shard for shard in local if shard not in chosen))
        looks += [(False, skips) for skips in opened if skips]
    remote = next((shard for shard in shards if is_remote(shard)), None)
    if remote is not None:
        stalled = StalledDataError(f"{remote} gave nothing for {_REMOTE_SECONDS:g} seconds")
        try:
            with time_limit(_REMOTE_SECONDS, stalled):
                looks.append(look(read(remote)))
        except StalledDataError as error:
            raise ValueError(str(error)) from None
    return looks


def _look_at(
    places: Sequence[T],
    read: Callable[[T], Iterable[RawSample | Skip]],
    look: Callable[[Iterable[RawSample | Skip]], _Look],
) -> list[_Look]:
    """Read in threads, some places ahead, and decode in this one, where it can be stopped."""
    looks: list[_Look] = []
    with ThreadPoolExecutor(_NUM_READERS) as executor:
        for start in range(0, len(places), _NUM_READERS):
            looks += map(look, executor.map(read, places[start : start + _NUM_READERS]))
    return looks


def _look(
    items: Iterable[RawSample | Skip],
    *,
    caption_key: str | None,
    found: Counter[str] | None,
    with_captions: bool,
) -> _Look:
    """Decode samples up to the first that can be used."""
    skips: list[Skip] = []
    for item in items:
        if isinstance(item, Skip):
            skips.append(item)
            continue
        try:
            if with_captions:
                decode_captions(item, caption_key=caption_key, found=found)
            decode_image(item)
            return True, skips
        except BadSampleError as error:
            skips.append(item.skip(error))
    return False, skips


def _judge(looks: list[_Look], flag: str) -> list[str]:
    skips = [skip for _, found in looks for skip in found]
    counts = Counter(skip.reason for skip in skips)
    what = f"{describe_reasons(counts)}; the first is {skips[0]}" if skips else ""
    if not any(is_usable for is_usable, _ in looks):
        raise UnusableDataError(
            f"no usable sample in the {len(looks)} places that were tried: {what}"
        )
    return [f"{flag} has bad samples: {what}"] if skips else []


def _check_amount(args: argparse.Namespace, shards: list[str]) -> list[str]:
    sizes, _ = size_shards(shards)
    num_samples = sum(sizes)
    warnings = []
    chosen = _spread(len(shards), _MAX_COUNTED)
    counts = index_shards([shards[index] for index in chosen])
    held = {shard: number for shard, (number, _) in counts.items()}
    if odd := misstated_sizes(dict(zip(shards, sizes, strict=True)), held):
        warnings.append(odd)
    wanted = args.train_num_samples
    if wanted is not None and wanted != num_samples and not args.dataset_resampled:
        effect = f"{num_samples - wanted} are left out of each epoch"
        if wanted > num_samples > 0:
            effect = f"each epoch draws {wanted - num_samples} more"
        warnings.append(
            f"--train-num-samples {wanted} is not what --train-data holds, {num_samples}: {effect}"
        )
    return warnings


def _spread(number: int, at_most: int) -> list[int]:
    """Return up to so many numbers below `number`, spread evenly."""
    chosen = min(number, at_most)
    return [index * number // chosen for index in range(chosen)]
