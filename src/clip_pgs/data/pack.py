"""Make shards from a table of images and captions."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from clip_pgs.data.tables import PairTable, default_separator, read_pairs

logger = logging.getLogger(__name__)

_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
_MAX_NAMED = 20


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
        logger.warning("row %d: %s", row + 1, reason)
    if len(bad_rows) > _MAX_NAMED:
        logger.warning("... and %d rows more", len(bad_rows) - _MAX_NAMED)
    if bad_rows and not skip_bad:
        row, reason = next(iter(bad_rows.items()))
        raise ValueError(
            f"{len(bad_rows)} of {len(table)} rows are bad, the first is row {row + 1}: {reason}; "
            "mend them or leave them out with --skip-bad"
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
        path = _image_path(table, row)
        if not table.images[row] or not path.is_file():
            bad_rows[row] = f"image {table.images[row]!r} does not exist"
        elif not caption.strip():
            bad_rows[row] = f"the caption of image {table.images[row]!r} is empty"
        else:
            try:
                with Image.open(path) as image:
                    image_format = image.format or "unknown"
            except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
                bad_rows[row] = f"{table.images[row]!r} is no readable image"
                continue
            if image_format in _SUFFIXES:
                suffixes[row] = _SUFFIXES[image_format]
            else:
                bad_rows[row] = f"image {table.images[row]!r} is {image_format}, not {_choices()}"
    return suffixes, bad_rows


def _choices() -> str:
    return "JPEG, PNG or WebP"


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
