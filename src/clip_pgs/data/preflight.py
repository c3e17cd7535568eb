"""Look at the data before a run begins: is it there, can it be read, is there enough of it."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from clip_pgs.data.decoding import time_limit
from clip_pgs.data.plan import SampleRef
from clip_pgs.data.samples import RawSample, decode_captions, decode_image
from clip_pgs.data.shards import expand_shards, is_remote, is_seekable
from clip_pgs.data.skips import BadSampleError, NoUsableSampleError, Skip, StalledDataError
from clip_pgs.data.stream import dataset_kind, read_table
from clip_pgs.data.tables import TableSource
from clip_pgs.data.tar import index_shards, read_shard, size_shards, unreadable_shard

_NUM_READERS = 8
# Of thousands of shards, all are opened, but only so many are read in.
_MAX_DECODED = 64
_MAX_COUNTED = 8
# A shard's first pair may be bad where the second is good.
_PAIRS_PER_SHARD = 3
_REMOTE_SECONDS = 60.0


@dataclass(frozen=True)
class _Look:
    """What a look at one place found: a usable sample, or what is wrong there."""

    is_usable: bool
    skips: list[Skip]


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
    for flag, path in (("--train-data", args.train_data), ("--val-data", args.val_data)):
        if path is None:
            continue
        kind = dataset_kind(args.dataset_type, path, flag=flag)
        try:
            if kind == "csv":
                looks = _look_at_rows(TableSource(read_table(args, path)))
            elif kind == "webdataset":
                shards = expand_shards(path)
                looks = _look_at_shards(shards, args.caption_key)
            else:
                continue
            warnings += _judge(looks, flag)
            if kind == "webdataset" and flag == "--train-data":
                warnings += _check_amount(args, shards)
        except NoUsableSampleError as error:
            raise NoUsableSampleError(f"{flag}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{flag}: {error}") from None
    return warnings


def _look_at_rows(source: TableSource) -> list[_Look]:
    with ThreadPoolExecutor(_NUM_READERS) as executor:
        rows = _spread(len(source.table), _MAX_DECODED)
        return list(executor.map(lambda row: _look([source.read(SampleRef(0, row))]), rows))


def _look_at_shards(shards: list[str], caption_key: str | None) -> list[_Look]:
    local = [shard for shard in shards if not is_remote(shard)]
    chosen = {local[index] for index in _spread(len(local), _MAX_DECODED)}

    def look(shard: str) -> _Look | None:
        return _look_into(shard, caption_key) if shard in chosen else _try_to_open(shard)

    with ThreadPoolExecutor(_NUM_READERS) as executor:
        looks = list(executor.map(look, local))
    remote = next((shard for shard in shards if is_remote(shard)), None)
    if remote is not None:
        stalled = StalledDataError(f"{remote} gave nothing for {_REMOTE_SECONDS:g} seconds")
        try:
            with time_limit(_REMOTE_SECONDS, stalled):
                looks.append(_look_into(remote, caption_key))
        except StalledDataError as error:
            raise ValueError(str(error)) from None
    return [look for look in looks if look is not None]


def _look_into(shard: str, caption_key: str | None) -> _Look:
    items = read_shard(shard, use_json=caption_key is not None)
    return _look(islice(items, _PAIRS_PER_SHARD), caption_key)


def _try_to_open(shard: str) -> _Look | None:
    """Return what is wrong with a shard that is not looked into."""
    try:
        with open(shard, "rb") as file:
            is_empty = not os.read(file.fileno(), 1)
    except OSError as error:
        return _Look(False, [unreadable_shard(shard, error)])
    return _Look(False, [Skip(shard, "", "empty shard")]) if is_empty else None


def _look(
    items: Iterator[RawSample | Skip] | list[RawSample | Skip], caption_key: str | None = None
) -> _Look:
    """Decode samples up to the first that can be used."""
    skips = []
    for item in items:
        if isinstance(item, Skip):
            skips.append(item)
            continue
        try:
            decode_captions(item, caption_key=caption_key)
            decode_image(item)
        except BadSampleError as error:
            skips.append(Skip(item.shard, item.key, error.reason, error.detail))
            continue
        return _Look(True, skips)
    return _Look(False, skips)


def _judge(looks: list[_Look], flag: str) -> list[str]:
    skips = [skip for look in looks for skip in look.skips]
    if not any(look.is_usable for look in looks):
        raise NoUsableSampleError(
            f"no usable sample in the {len(looks)} places that were tried: {_describe(skips)}"
        )
    return [f"{flag} has bad samples: {_describe(skips)}"] if skips else []


def _describe(skips: list[Skip]) -> str:
    counts = Counter(skip.reason for skip in skips)
    reasons = ", ".join(f"{reason}: {number}" for reason, number in counts.most_common())
    return f"{reasons}; the first is {skips[0]}"


def _check_amount(args: argparse.Namespace, shards: list[str]) -> list[str]:
    if not all(map(is_seekable, shards)):
        return []
    sizes, _ = size_shards(shards)
    num_samples = sum(sizes)
    warnings = []
    chosen = _spread(len(shards), _MAX_COUNTED)
    counts = index_shards([shards[index] for index in chosen])
    for index in chosen:
        stated, counted = sizes[index], counts[shards[index]][0]
        if stated != counted:
            path = Path(shards[index])
            warnings.append(
                f"{path.parent / 'sizes.json'} says that {path.name} has {stated} samples, but it "
                f"has {counted}"
            )
    wanted = args.train_num_samples
    if wanted is not None and wanted != num_samples and not args.dataset_resampled:
        part = "left out of each epoch" if wanted < num_samples else "seen twice or more"
        warnings.append(
            f"--train-num-samples {wanted} is not what --train-data holds, {num_samples}: "
            f"{abs(wanted - num_samples)} are {part}"
        )
    return warnings


def _spread(number: int, at_most: int) -> list[int]:
    """Return up to so many numbers below `number`, spread evenly."""
    chosen = min(number, at_most)
    return [index * number // chosen for index in range(chosen)]
