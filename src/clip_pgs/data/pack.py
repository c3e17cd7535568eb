"""Make shards from a table of images and captions, and say what is in shards."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from clip_pgs.data.decoding import UnreadableImageError, opened_image
from clip_pgs.data.samples import RawSample, decode_captions, decode_image
from clip_pgs.data.shards import is_remote, read_sizes
from clip_pgs.data.skips import BadSampleError, Skip
from clip_pgs.data.tables import PairTable, default_separator, read_pairs, row_name
from clip_pgs.data.tar import read_shard

logger = logging.getLogger(__name__)

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_MAX_NAMED = 20
_HEADER = ("shard", "samples", "usable", "images", "captions", "bad", "characters", "pixels")
_MAX_BAD_NAMED = 100


@dataclass(frozen=True)
class PackResult:
    """What was written.

    Args:
        sizes: Number of pairs by shard name, in order.
        num_skipped: Rows left out.
    """

    sizes: dict[str, int]
    num_skipped: int


def pack_pairs(
    table_path: Path,
    out: Path,
    *,
    shard_size: int = 1000,
    image_key: str = "filepath",
    caption_key: str = "title",
    separator: str | None = None,
    skip_bad: bool = False,
) -> PackResult:
    """Write a table's pairs as webdataset shards, with `sizes.json`.

    The images' bytes are kept as they are; the same table gives the same bytes. `out` appears
    whole or not at all.

    Args:
        table_path: Table with a header; relative image paths start at its folder.
        out: New or empty folder for `00000.tar`, `00001.tar`, ... and `sizes.json`.
        shard_size: Pairs per shard; the last one may hold fewer.
        image_key: Column of image paths (JPEG, PNG or WebP).
        caption_key: Column of captions.
        separator: What stands between columns; None goes by the name (`.tsv`: tab).
        skip_bad: Leave out rows without a readable image or a caption instead of stopping.

    Raises:
        ValueError: If the table or `out` cannot be used, if rows are bad and `skip_bad` is
            not set, or if no row is left.
    """
    if shard_size < 1:
        raise ValueError(f"--shard-size must be >= 1, got {shard_size}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{str(out)!r} exists and is no empty folder; name a new one")
    table = read_pairs(
        table_path,
        image_key=image_key,
        caption_key=caption_key,
        separator=separator or default_separator(table_path),
    )

    suffixes, bad_rows = _inspect_rows(table)
    for row, reason in list(bad_rows.items())[:_MAX_NAMED]:
        logger.warning("%s: %s", row_name(row), reason)
    if len(bad_rows) > _MAX_NAMED:
        logger.warning("... and %d rows more", len(bad_rows) - _MAX_NAMED)
    if bad_rows and not skip_bad:
        row, reason = next(iter(bad_rows.items()))
        raise ValueError(
            f"{len(bad_rows)} of {len(table)} rows are bad, the first is {row_name(row)}: "
            f"{reason}; mend them or leave them out with --skip-bad"
        )
    if not suffixes:
        raise ValueError(f"table {str(table_path)!r} has no usable row")

    sizes: dict[str, int] = {}
    rows = list(suffixes)
    with _appearing_folder(out) as folder:
        for start in range(0, len(rows), shard_size):
            name = f"{start // shard_size:05d}.tar"
            shard_rows = rows[start : start + shard_size]
            with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
                for row in shard_rows:
                    image = _image_path(table, row).read_bytes()
                    _add_member(tar, f"{row:09d}.{suffixes[row]}", image)
                    _add_member(tar, f"{row:09d}.txt", table.captions[row].encode())
            sizes[name] = len(shard_rows)
        (folder / "sizes.json").write_text(json.dumps(sizes, indent=1) + "\n", encoding="utf-8")
    return PackResult(sizes, len(bad_rows))


def _inspect_rows(table: PairTable) -> tuple[dict[int, str], dict[int, str]]:
    """Return the image suffix of each good row and the reason against each bad one."""
    suffixes: dict[int, str] = {}
    bad_rows: dict[int, str] = {}
    for row, caption in enumerate(table.captions):
        path, name = _image_path(table, row), repr(table.images[row])
        if is_remote(table.images[row]):
            bad_rows[row] = f"image {name} is a URL; img2dataset makes shards of those"
        elif not table.images[row] or not _is_file(path):
            bad_rows[row] = f"image {name} does not exist"
        elif not caption.strip():
            bad_rows[row] = f"the caption of image {name} is empty"
        else:
            try:
                with opened_image(path) as image:
                    image_format = image.format or "unknown"
            except UnreadableImageError as error:
                bad_rows[row] = f"{name} is no readable image: {error}"
                continue
            if image_format in _SUFFIXES:
                suffixes[row] = _SUFFIXES[image_format]
            else:
                bad_rows[row] = f"image {name} is {image_format}, not JPEG, PNG or WebP"
    return suffixes, bad_rows


def _is_file(path: Path) -> bool:
    # Python 3.10 raises on names that no file can have.
    with suppress(ValueError, OSError):
        return path.is_file()
    return False


def _image_path(table: PairTable, row: int) -> Path:
    return table.path.parent / table.images[row]


def _add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # A fresh TarInfo has time, owner and mode of nobody, so that bytes repeat.
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@contextmanager
def _appearing_folder(path: Path) -> Iterator[Path]:
    """Give a folder that takes its name when all went well, and vanishes otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        # mkdtemp lets nobody else in; the new folder has the mode of its neighbour.
        partial.chmod(path.parent.stat().st_mode & 0o777)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass
class ShardReport:
    """What a shard, or several together, hold.

    Args:
        num_samples: Groups of members with one key.
        num_usable: Those with a readable image and a caption.
        num_images: Images that can be decoded.
        num_captions: Pictures with captions in UTF-8.
        caption_lengths: Characters of each such caption, all of a picture.
        widths: Width in pixels of each such image.
        heights: Height in pixels of each such image.
        bad: What is wrong: samples and, with an empty key, the shard itself.
    """

    num_samples: int = 0
    num_usable: int = 0
    num_images: int = 0
    num_captions: int = 0
    caption_lengths: list[int] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    bad: list[Skip] = field(default_factory=list)

    def add(self, other: ShardReport) -> None:
        """Add another report to this one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def check_shard(shard: str, *, caption_key: str | None = None) -> ShardReport:
    """Read a shard through, decoding every image and caption.

    Args:
        shard: An expanded shard.
        caption_key: See `SampleDecoder`.
    """
    report = ShardReport()
    for item in read_shard(shard, use_json=caption_key is not None):
        if isinstance(item, Skip):
            report.num_samples += bool(item.key)
            report.bad.append(item)
        else:
            _check_sample(item, report, caption_key)
    sizes_path = Path(shard).parent / "sizes.json"
    if not is_remote(shard) and sizes_path.is_file():
        stated = read_sizes(sizes_path).get(Path(shard).name)
        if stated != report.num_samples:
            detail = f"it says {stated}, the shard has {report.num_samples}"
            report.bad.append(Skip(shard, "", "sizes.json is wrong", detail))
    return report


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
    """
    shards = list(shards)
    width = max(len(name) for name in [*shards, "shard"])
    write(_format_row(_HEADER, width))
    total = ShardReport()
    for shard in shards:
        report = check_shard(shard, caption_key=caption_key)
        write(_format_row(_cells(shard, report), width))
        total.add(report)
    write(_format_row(_cells("total", total), width))
    for skip in total.bad[:_MAX_BAD_NAMED]:
        write(f"bad: {skip}\n")
    if len(total.bad) > _MAX_BAD_NAMED:
        write(f"bad: {len(total.bad) - _MAX_BAD_NAMED} more\n")
    write(f"\n--train-num-samples {total.num_usable}\n")
    return total


def _check_sample(raw: RawSample, report: ShardReport, caption_key: str | None) -> None:
    report.num_samples += 1
    problems: list[BadSampleError] = []
    try:
        image = decode_image(raw)
        report.num_images += 1
        report.widths.append(image.width)
        report.heights.append(image.height)
    except BadSampleError as error:
        problems.append(error)
    try:
        captions = decode_captions(raw, caption_key=caption_key)
        report.num_captions += 1
        report.caption_lengths += map(len, captions)
    except BadSampleError as error:
        problems.append(error)
    report.num_usable += not problems
    report.bad += [Skip(raw.shard, raw.key, each.reason, each.detail) for each in problems]


def _cells(name: str, report: ShardReport) -> tuple[str, ...]:
    characters = pixels = "-"
    if report.caption_lengths:
        shortest, longest = min(report.caption_lengths), max(report.caption_lengths)
        characters = f"{shortest}..{longest} (median {median(report.caption_lengths):.0f})"
    if report.widths:
        widths, heights = report.widths, report.heights
        pixels = f"{min(widths)}..{max(widths)} x {min(heights)}..{max(heights)}"
    counts = (report.num_samples, report.num_usable, report.num_images, report.num_captions)
    return (name, *map(str, counts), str(len(report.bad)), characters, pixels)


def _format_row(cells: tuple[str, ...], width: int) -> str:
    name, *counts, characters, pixels = cells
    numbers = "".join(f"{count:>10}" for count in counts)
    return f"{name:<{width}}{numbers}  {characters:<24}  {pixels}".rstrip() + "\n"
