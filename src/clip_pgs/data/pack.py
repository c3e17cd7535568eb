"""Make shards from a table of images and captions, and say what is in shards."""

from __future__ import annotations

import json
import logging
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from clip_pgs.common import explained, one_sentence
from clip_pgs.data.bad_samples import BadSampleError, Skip
from clip_pgs.data.caption_tables import (
    PairTable,
    listed_captions,
    read_pairs,
)
from clip_pgs.data.decoding import opened_image, read_image_file
from clip_pgs.data.samples import (
    MAX_CAPTION_BYTES,
    RawSample,
    caption_fields,
    decode_captions,
    decode_image,
    is_image,
    missing_fields,
)
from clip_pgs.data.shards import MAX_SHARDS, is_remote, read_sizes, shard_pattern, write_shard
from clip_pgs.data.tar import read_shard
from clip_pgs.files import absence, atomic_folder
from clip_pgs.tables import counted

logger = logging.getLogger(__name__)

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_MAX_NAMED = 20
_HEADER = ("shard", "samples", "usable", "images", "captions", "bad", "characters", "pixels")
_MAX_BAD_NAMED = 100


def pack_pairs(
    table: Path,
    out: Path,
    *,
    shard_size: int = 1000,
    image_key: str = "filepath",
    caption_key: str = "title",
    separator: str | None = None,
    skip_bad: bool = False,
) -> tuple[dict[str, int], int]:
    """Write a table's pairs as webdataset shards, with `sizes.json`.

    The images' bytes are kept as they are; the same table gives the same bytes. `out` appears
    whole or not at all.

    Args:
        table: Table with a header; relative image paths start at its folder.
        out: New or empty folder for `00000.tar`, `00001.tar`, ... and `sizes.json`. All numbers
            have as many digits, as the braces of a pattern write them.
        shard_size: Pairs per shard; the last one may hold fewer.
        image_key: Column of image paths (JPEG, PNG or WebP).
        caption_key: Column of captions.
        separator: What stands between columns; None goes by the name (`.tsv`: tab).
        skip_bad: Leave out rows without a caption or an image that can be opened, instead of
            stopping; none is decoded, which `check_shards` does.

    Returns:
        Number of pairs by shard name, in order, and number of rows left out.

    Raises:
        ValueError: If the table or `out` cannot be used, if rows are bad and `skip_bad` is
            not set, if no row is left, or there would be more than `MAX_SHARDS`.
    """
    if shard_size < 1:
        raise ValueError(f"--shard-size must be >= 1, got {shard_size}")
    _check_new(out)
    shard_pattern(out, ["00000.tar"])
    keys = {"image_key": image_key, "caption_key": caption_key}
    pairs = read_pairs(table, **keys, separator=separator)
    if odd := listed_captions(pairs):
        logger.warning("%s", odd)

    suffixes: dict[int, str] = {}
    bad_rows: dict[int, str] = {}
    for row in range(len(pairs)):
        try:
            suffixes[row] = _check_row(pairs, row)
        except ValueError as error:
            bad_rows[row] = str(error)
    for row, reason in list(bad_rows.items())[:_MAX_NAMED]:
        logger.warning("%s: %s", pairs.row_name(row), reason)
    if len(bad_rows) > _MAX_NAMED:
        logger.warning("... and %s more", counted(len(bad_rows) - _MAX_NAMED, "row"))
    if bad_rows and not skip_bad:
        row, reason = next(iter(bad_rows.items()))
        raise ValueError(
            f"{len(bad_rows)} of {len(pairs)} rows are bad, the first is {pairs.row_name(row)}: "
            f"{reason}; mend them or leave them out with --skip-bad"
        )
    if not suffixes:
        raise ValueError(f"table {str(table)!r} has no usable row")

    starts = range(0, len(suffixes), shard_size)
    names = shard_names(len(starts))

    def members(row: int) -> dict[str, bytes]:
        image = read_image_file(_image_path(pairs, row))
        return {suffixes[row]: image, "txt": pairs.captions[row].encode()}

    sizes: dict[str, int] = {}
    rows = list(suffixes)
    with atomic_folder(out) as folder:
        # Another process may have made it while rows were checked.
        _check_new(out)
        for name, start in zip(names, starts, strict=True):
            shard_rows = rows[start : start + shard_size]
            write_shard(folder / name, ((f"{row:09d}", members(row)) for row in shard_rows))
            sizes[name] = len(shard_rows)
        (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    return sizes, len(bad_rows)


def shard_names(number: int) -> list[str]:
    """Return the names of so many shards, `00000.tar` and so on.

    Raises:
        ValueError: If they are more than a pattern may name.
    """
    if number > MAX_SHARDS:
        raise ValueError(f"{number} shards are more than {MAX_SHARDS}; raise --shard-size")
    width = max(5, len(str(number - 1)))
    return [f"{index:0{width}d}.tar" for index in range(number)]


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists and is no empty folder; name a new one")


def _check_row(table: PairTable, row: int) -> str:
    """Return the suffix of a row's image.

    Raises:
        ValueError: What is wrong with the row.
    """
    path, name = _image_path(table, row), repr(table.images[row])
    if not table.images[row].strip():
        raise ValueError("it names no image")
    if is_remote(table.images[row]):
        raise ValueError(f"image {name} is a URL; img2dataset makes shards of those")
    if not os.path.isfile(path):
        raise ValueError(f"image {name} {absence(path)}")
    if not table.captions[row].strip():
        raise ValueError(f"the caption of image {name} is empty")
    num_bytes = len(table.captions[row].encode())
    if num_bytes > MAX_CAPTION_BYTES:
        limit = f"{num_bytes} bytes, more than {MAX_CAPTION_BYTES}"
        raise ValueError(f"the caption of image {name} has {limit}")
    with explained(f"{name} is no readable image"), opened_image(path) as image:
        image_format = image.format
    if image_format not in _SUFFIXES:
        raise ValueError(f"image {name} is {image_format}, not JPEG, PNG or WebP")
    return _SUFFIXES[image_format]


def _image_path(table: PairTable, row: int) -> Path:
    return table.path.parent / table.images[row]


@dataclass
class ShardReport:
    """What a shard, or several together, hold; it takes as much memory for any number of samples.

    Args:
        num_samples: Groups of members with one key.
        num_usable: Those with a readable image and a caption.
        num_captions: Pictures with captions in UTF-8.
        caption_lengths: How many such captions, all of a picture, have so many characters.
        widths: How many images that can be decoded have so many pixels in a row.
        heights: And in a column.
        num_bad: Number of things that are wrong.
        bad: The first of them: samples and, with an empty key, the shard itself.
        num_crowded: Number of samples with images that are not read, beside the one that is.
        crowded: The first of them.
        fields: Samples by field of `--caption-key` that they have.
    """

    num_samples: int = 0
    num_usable: int = 0
    num_captions: int = 0
    caption_lengths: Counter[int] = field(default_factory=Counter)
    widths: Counter[int] = field(default_factory=Counter)
    heights: Counter[int] = field(default_factory=Counter)
    num_bad: int = 0
    bad: list[Skip] = field(default_factory=list)
    num_crowded: int = 0
    crowded: list[Skip] = field(default_factory=list)
    fields: Counter[str] = field(default_factory=Counter)

    def add(self, other: ShardReport) -> None:
        """Add another report to this one."""
        for name, value in vars(other).items():
            own = getattr(self, name)
            if isinstance(own, Counter):
                own.update(value)
            elif isinstance(own, list):
                own += value[: _MAX_BAD_NAMED - len(own)]
            else:
                setattr(self, name, own + value)


def check_shard(shard: str, *, caption_key: str | None = None) -> ShardReport:
    """Read a shard through, decoding every image and caption.

    Args:
        shard: An expanded shard.
        caption_key: See `SampleDecoder`.
    """
    report = ShardReport()
    for item in read_shard(shard, use_json=caption_key is not None):
        sample = ShardReport(num_samples=bool(item.key))
        if isinstance(item, Skip):
            _note_bad(sample, item)
        else:
            _check_sample(item, sample, caption_key)
        sample.num_usable = int(not sample.num_bad)
        report.add(sample)
    sizes_path = Path(shard).parent / "sizes.json"
    if not is_remote(shard) and sizes_path.is_file():
        # Training counts what it leaves out.
        stated = read_sizes(sizes_path).get(Path(shard).name, report.num_samples)
        if stated != report.num_samples:
            detail = f"it says {stated}, the shard has {report.num_samples}"
            _note_bad(report, Skip(shard, "", "sizes.json is wrong", detail))
    return report


def _note_bad(report: ShardReport, skip: Skip) -> None:
    report.add(ShardReport(num_bad=1, bad=[skip]))


def _check_sample(raw: RawSample, report: ShardReport, caption_key: str | None) -> None:
    """Note what a sample holds, and what is wrong with it."""
    images = [suffix for suffix in raw.suffixes.split() if is_image(suffix)]
    if raw.image is not None and len(images) > 1:
        report.num_crowded = 1
        report.crowded.append(Skip(raw.shard, raw.key, ", ".join(images)))
    try:
        width, height = decode_image(raw).size
        report.widths[width] += 1
        report.heights[height] += 1
    except BadSampleError as error:
        _note_bad(report, raw.skip(error))
    try:
        captions = decode_captions(raw, caption_key=caption_key, found=report.fields)
        report.caption_lengths.update(map(len, captions))
        report.num_captions += 1
    except BadSampleError as error:
        _note_bad(report, raw.skip(error))


def check_shards(
    shards: Iterable[str], write: Callable[[str], object], *, caption_key: str | None = None
) -> ShardReport:
    """Check shards one after the other and write a table of them, a row when it is known.

    Args:
        shards: Expanded shards.
        write: Takes the text.
        caption_key: See `SampleDecoder`.

    Returns:
        The total over all shards.

    Raises:
        ValueError: If `caption_key` has an empty name.
    """
    if caption_key is not None:
        caption_fields(caption_key)
    shards = list(shards)
    width = max(len(name) for name in [*shards, "shard"])
    write(_format_row(_HEADER, width))
    total = ShardReport()
    for shard in shards:
        report = check_shard(shard, caption_key=caption_key)
        write(_format_row(_cells(shard, report), width))
        total.add(report)
    write(_format_row(_cells("total", total), width))
    for skip in total.bad:
        write(f"bad: {skip}\n")
    if total.num_bad > len(total.bad):
        write(f"bad: {total.num_bad - len(total.bad)} more\n")
    if total.crowded:
        number = counted(total.num_crowded, "sample")
        write(
            f"warning: {number} with images that are not read, beside the one that is: a sample's "
            f"name ends at its first dot, so that a.b.jpg is part of a; the first is "
            f"{total.crowded[0]}\n"
        )
    if odd := missing_fields(caption_key, total.fields):
        write(f"warning: {odd}\n")
    # Bad samples keep their places in an epoch, in which others stand in for them.
    write(f"\n--train-num-samples {total.num_samples}\n")
    return total


def _cells(name: str, report: ShardReport) -> tuple[str, ...]:
    characters = pixels = "-"
    lengths, num_images = report.caption_lengths, report.widths.total()
    if lengths:
        characters = f"{min(lengths)}..{max(lengths)} (median {_median(lengths):.0f})"
    if num_images:
        pixels = " x ".join(
            f"{min(sides)}..{max(sides)}" for sides in (report.widths, report.heights)
        )
    counts = (report.num_samples, report.num_usable, num_images, report.num_captions)
    return (one_sentence(name), *map(str, counts), str(report.num_bad), characters, pixels)


def _median(counts: Counter[int]) -> float:
    """Return the median of numbers of which each stands so often."""
    values = sorted(counts)
    ends = [*accumulate(counts[value] for value in values)]
    middle = ((ends[-1] - 1) // 2, ends[-1] // 2)
    return sum(values[bisect_right(ends, place)] for place in middle) / 2


def _format_row(cells: tuple[str, ...], width: int) -> str:
    name, *counts, characters, pixels = cells
    numbers = "".join(f"{count:>10}" for count in counts)
    return f"{name:<{width}}{numbers}  {characters:<24}  {pixels}".rstrip() + "\n"
