"""Tables of image paths and captions (CSV and the like)."""

from __future__ import annotations

import codecs
import csv
import logging
import operator
import os
import re
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import unquote

import pandas as pd

from clip_pgs.common import explained
from clip_pgs.data.bad_samples import Skip
from clip_pgs.data.decoding import read_image_file, time_limit
from clip_pgs.data.order import SampleRef
from clip_pgs.data.samples import IMAGE_SUFFIXES, RawSample
from clip_pgs.data.shards import folder_of_shards, is_remote
from clip_pgs.files import absence, file_state
from clip_pgs.tables import counted

logger = logging.getLogger(__name__)

_MAX_NAMED, _MAX_COLUMNS = 5, 20
_ADVICE = "a quotation mark that begins a cell must be doubled and quoted"
_SEPARATORS = (",", "\t", ";", "|")
_HEAD_BYTES, _TAIL_BYTES, _CHUNK_BYTES = 512, 2**16, 2**20
# Of files of older Office programs.
_OLE_MAGIC = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
# How files of gzip, bzip2, xz, zstd and zip begin.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")
# The word that tar writes at byte 257 of a header.
_TAR_MAGIC, _TAR_MAGIC_AT = b"ustar", 257
# What no text holds, but workbooks, archives and what is compressed do.
_CONTROL = re.compile(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]")
# Texts in quotes and brackets, as Python, JSON and numpy write them.
_LIST = re.compile(r"""\[\s*(?:'.*'|".*")\s*\]""", re.DOTALL)
_TOO_MANY = re.compile(r"Expected \d+ fields in line (\d+)")
# The share of rows that may name the image of another without being worth a word.
_MAX_REPEATED = 0.05
# Many times what it takes to part a table's columns by an expression.
_LEAST_SECONDS, _BYTES_PER_SECOND = 10.0, 2**18


@dataclass(frozen=True)
class PairTable:
    """The pairs of a table, row by row.

    Args:
        path: The table's file, or a folder of images.
        images: Image paths as written there.
        captions: Captions; empty where the cell is.
        numbers: Of the rows in the file, from 0: those whose cells are all empty are left out.
    """

    path: Path
    images: list[str]
    captions: list[str]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.images)

    def row_name(self, row: int) -> str:
        """Name a row, which a reader of the file counts from 1 below the header."""
        return _row_name(self.numbers[row])


@dataclass(frozen=True)
class TableSource:
    """Pairs of a table; image paths are relative to the working directory, as OpenCLIP's are."""

    table: PairTable

    def read(self, ref: SampleRef) -> RawSample | Skip:
        """Read one row's image file."""
        table, path = str(self.table.path), self.table.images[ref.number]
        key = self.table.row_name(ref.number)
        if not path.strip():
            return Skip(table, key, "no image", "its row names none")
        try:
            image = read_image_file(path)
        except (OSError, ValueError) as error:
            reason = "image is a URL" if is_remote(path) else "unreadable image file"
            detail = f"{path!r}; img2dataset makes shards of it" if is_remote(path) else str(error)
            return Skip(table, key, reason, detail)
        caption = self.table.captions[ref.number].encode()
        return RawSample(table, key, image, (caption,), ref.repeat, path=path)

    def describe(self, shard: int, number: int) -> str:
        """Return the row and its image's path."""
        return f"{self.table.path}: {self.table.row_name(number)} ({self.table.images[number]})"


def _row_name(number: int) -> str:
    return f"row {number + 1}"


def read_pairs(
    path: Path,
    *,
    image_key: str,
    caption_key: str,
    separator: str | None,
    separator_flag: str = "--separator",
) -> PairTable:
    r"""Read the image and caption columns of a table.

    Args:
        path: A text file in UTF-8 with a header line.
        image_key: Name of the column of image paths.
        caption_key: Name of the column of captions.
        separator: What stands between columns, as OpenCLIP takes it: one character, "\t" in two,
            or a regular expression. None goes by the name: a tab for `.tsv`, else a comma.
        separator_flag: The option that gives it, for messages.

    Raises:
        ValueError: If the file is missing, is no such table, lacks a column or has two of its name,
            has more cells than columns, or has no rows.
    """
    keys = image_key, caption_key
    (images, captions), numbers = _read_columns(path, keys, separator, separator_flag)
    return PairTable(path, list(map(_local_path, images)), captions, numbers)


def _local_path(image: str) -> str:
    """Return the path that a file:/// URL stands for, and what else there is as it is."""
    is_url = image[:8].lower() == "file:///"
    return unquote(image[len("file://") :]) if is_url else image


def listed_captions(table: PairTable) -> str:
    """Say which captions look like lists of texts, as pandas writes them; "" where none does."""
    rows = [row for row, text in enumerate(table.captions) if _LIST.fullmatch(text.strip())]
    if not rows:
        return ""
    return (
        f"{table.path} has {counted(len(rows), 'caption')} that look like lists, and are taken as "
        f"one text each; the first is {table.row_name(rows[0])}: {table.captions[rows[0]]!r:.80}"
    )


def repeated_images(table: PairTable) -> str:
    """Say how many images stand in several rows; "" where those are few."""
    num_images = len(set(table.images))
    if len(table) - num_images <= _MAX_REPEATED * len(table):
        return ""
    return f"{table.path} names {counted(num_images, 'image')} in {counted(len(table), 'row')}"


def list_images(folder: Path) -> PairTable:
    """Return the images in a folder and those below, by their paths' order, without captions.

    Hidden ones do not count; links to folders are followed, to each folder once. A process lists a
    folder once, unless a name comes or goes right in it.

    Raises:
        ValueError: If there is none, or a folder cannot be read.
    """
    status = folder.stat()
    return _list_once(folder, status.st_ino, status.st_mtime_ns)


# The checks of a run list the images that it trains on.
@lru_cache(maxsize=2)
def _list_once(folder: Path, inode: int, mtime_ns: int) -> PairTable:
    images: list[str] = []
    seen: set[tuple[int, int]] = set()
    for place, below, names in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        status = os.stat(place)
        # Links may lead to one folder twice, or in a circle.
        if (status.st_dev, status.st_ino) in seen:
            below.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below[:] = sorted(name for name in below if not name.startswith("."))
        images += [
            os.path.join(place, name)
            for name in names
            # Beside each file of its own macOS writes a hidden one onto other disks.
            if Path(name).suffix[1:].lower() in IMAGE_SUFFIXES and not name.startswith(".")
        ]
    images.sort()
    if not images:
        raise ValueError(
            folder_of_shards(folder)
            or f"folder {str(folder)!r} holds no .{', .'.join(IMAGE_SUFFIXES)} file"
        )
    return PairTable(folder, images, [""] * len(images), range(len(images)))


def _refuse_folder(error: OSError) -> NoReturn:
    raise ValueError(f"folder {error.filename!r} cannot be read: {error.strerror}")


def read_captions(path: Path, *, caption_key: str, separator: str | None) -> list[str]:
    """Read the captions of a table; see `read_pairs`."""
    ((captions,), _) = _read_columns(path, (caption_key,), separator)
    return captions


def _read_columns(
    path: Path,
    keys: tuple[str, ...],
    separator: str | None,
    separator_flag: str = "--separator",
) -> tuple[list[list[str]], Sequence[int]]:
    if not path.is_file():
        raise ValueError(f"table {str(path)!r} {absence(path)}")
    if separator is None:
        separator = "\t" if path.suffix.lower() == ".tsv" else ","
    return _read_once(path, keys, separator, separator_flag, file_state(path.stat()))


# The checks of a run read the table that its phases read.
@lru_cache(maxsize=2)
def _read_once(
    path: Path,
    keys: tuple[str, ...],
    separator: str,
    separator_flag: str,
    state: tuple[int, int, int],
) -> tuple[list[list[str]], Sequence[int]]:
    _check_text(path)
    # A shell hands over a backslash and a t, which OpenCLIP takes for a regular expression.
    separator = {"\\t": "\t"}.get(separator, separator)
    # A separator may be an expression.
    with explained(f"table {str(path)!r} cannot be read with separator {separator!r}", Exception):
        # pandas gives further columns of a name another.
        names = _read_frame(path, separator, header=None, nrows=1).iloc[0].tolist()
        try:
            frame, longer = _read_rows(path, separator, names)
        except pd.errors.ParserError as error:
            # A quote that begins a cell, and none that ends it.
            if "inside string" not in str(error):
                raise
            as_text, longer = _read_as_text(path, separator, len(names)), ""
            if as_text is None:
                raise ValueError(f"{str(error).partition(': ')[2]}; {_ADVICE}") from error
            frame = as_text
        # In a cell of whichever column.
        is_broken = frame.apply(_has_line_break).any(axis=1)
        if is_broken.any():
            frame = _without_swallowed_rows(path, frame, is_broken, separator)
    columns = ", ".join(f"{str(column)!r:.60}" for column in names[:_MAX_COLUMNS])
    if len(names) > _MAX_COLUMNS:
        columns += f" and {len(names) - _MAX_COLUMNS} more"
    for key in keys:
        if (number := names.count(key)) != 1:
            found = f"{number} columns" if number else "no column"
            raise ValueError(
                f"table {str(path)!r} has {found} {key!r}; with separator {separator!r} it has "
                f"{columns}{_fitting_separator(path, keys, separator_flag)}"
            )
    if longer:
        raise ValueError(
            f"table {str(path)!r} has rows of more cells than its header has names ({columns}), "
            f"the first is {longer}, so that it is not known which cell is which; name every "
            "column, and quote each cell that holds a separator"
        )
    frame = _without_empty_rows(frame, keys[0])
    if frame.empty:
        raise ValueError(f"table {str(path)!r} has no rows")
    return [frame[key].tolist() for key in keys], frame.index


def _fitting_separator(path: Path, keys: tuple[str, ...], flag: str) -> str:
    """Say how a table gets its columns, by the first line or a usual separator; else ""."""
    with path.open("rb") as file:
        first = file.readline(_HEAD_BYTES).strip().removeprefix(codecs.BOM_UTF8).strip(b'"')
    if re.fullmatch(rb"(?i)sep=[ -~]?", first):
        return f"; its first line, {first.decode()!r}, is for Excel and no header: remove it"
    for separator in _SEPARATORS:
        # What the header line is to another separator may be anything.
        with suppress(Exception):
            names = _read_frame(path, separator, header=None, nrows=1).iloc[0].tolist()
            if all(names.count(key) == 1 for key in keys):
                written = shlex.quote(separator.replace("\t", "\\t"))
                return f"; write {flag} {written}"
    return ""


def _without_empty_rows(frame: pd.DataFrame, key: str) -> pd.DataFrame:
    """Leave out rows without any text, as a spreadsheet writes those that were cleared."""
    bare = frame[frame[key].str.strip() == ""]
    has_text = reduce(operator.or_, (cells.str.strip() != "" for _, cells in bare.items()))
    return frame if has_text.all() else frame.drop(bare.index[~has_text])


def is_tar(path: Path) -> bool:
    """Return whether a file begins as a tar archive does."""
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES).startswith(_TAR_MAGIC, _TAR_MAGIC_AT)


def _check_text(path: Path) -> None:
    """Refuse what is no text in UTF-8, by what it is."""
    if is_tar(path):
        raise ValueError(f"table {str(path)!r} is a tar archive, no text file")
    decoder, misfit, num_lines = codecs.getincrementaldecoder("utf-8")(), None, 1
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
        file.seek(0)
        while chunk := file.read(_CHUNK_BYTES):
            before, nul, _ = chunk.partition(b"\0")
            try:
                decoder.decode(before)
            except UnicodeDecodeError as error:
                before, misfit = error.object[: error.start], error.object[error.start]
            num_lines += len(re.findall(rb"\r\n?|\n", before))
            if nul or misfit is not None:
                break
        else:
            # Of a letter that the end cuts short.
            rest, _ = decoder.getstate()
            if not rest:
                return
            misfit = rest[0]
    if _is_workbook(path, head):
        raise ValueError(
            f"table {str(path)!r} is a workbook of Excel or the like, no text file; save it as CSV "
            "(UTF-8)"
        )
    if head.startswith(_COMPRESSED):
        raise ValueError(f"table {str(path)!r} is compressed, no text file; unpack it first")
    if (encoding := _wide_encoding(head)) is not None:
        raise ValueError(
            f"table {str(path)!r} is a text file in {encoding}, not in UTF-8; "
            f"{_conversion(encoding)}"
        )
    # The last letter may be cut short.
    is_broken = 0 in head and "\ufffd" in head.decode("utf-8", "replace")[:-1]
    if _CONTROL.search(head) is not None or not any(head) or is_broken:
        raise ValueError(f"table {str(path)!r} is no text file in UTF-8")
    if misfit is not None:
        raise ValueError(
            f"table {str(path)!r} is no text file in UTF-8: line {num_lines} holds byte "
            f"0x{misfit:02x}; if it is one in CP1252 (or Latin-1), {_conversion('CP1252')}"
        )
    raise ValueError(
        f"table {str(path)!r} holds a NUL character in line {num_lines}, which no text has; "
        "remove it, or write the table anew"
    )


def _is_workbook(path: Path, head: bytes) -> bool:
    """Return whether a file is .xls, .ods or .xlsx, whatever its name."""
    if head.startswith(_OLE_MAGIC) or b"opendocument.spreadsheet" in head:
        return True
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        # A zip archive ends with the names of what it holds.
        return head.startswith(b"PK") and b"xl/workbook." in file.read()


def _conversion(encoding: str) -> str:
    return f"turn it into one: iconv -f {encoding} -t UTF-8 OLD > NEW, or save it anew as CSV UTF-8"


def _wide_encoding(head: bytes) -> str | None:
    """Return the encoding of a text of 2 or 4 bytes a letter, by its mark or first letters."""
    # The mark of UTF-32 begins with that of UTF-16.
    for name, width, marks in (
        ("UTF-32", 4, (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)),
        ("UTF-16", 2, (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)),
    ):
        if head.startswith(marks):
            return name
        # The header line names columns, in letters of ASCII as a rule.
        places = [head[place:16:width] for place in range(width)]
        filled = [place for place, values in enumerate(places) if any(values)]
        if filled in ([0], [width - 1]) and all(places[filled[0]]):
            return f"{name}{'LE' if filled == [0] else 'BE'}"
    return None


def _has_line_break(cells: pd.Series) -> pd.Series:
    return cells.str.contains("\n", regex=False) | cells.str.contains("\r", regex=False)


def _read_rows(path: Path, separator: str, names: list[str]) -> tuple[pd.DataFrame, str]:
    """Return the rows, and the first that has more cells than there are names, or ""."""
    try:
        frame = _read_frame(path, separator)
        # It takes the first cells of longer rows for an index.
        if len(separator) == 1 and isinstance(frame.index, pd.RangeIndex):
            return frame, ""
        # The other engine tells an empty cell from one that is not there.
        places = range(len(names) + 1)
        frame = _read_frame(path, separator, header=None, names=places, engine="python")
    except pd.errors.ParserError as error:
        if (found := _TOO_MANY.search(str(error))) is None:
            raise
        return pd.DataFrame(columns=names, dtype=str), f"line {found[1]}"
    frame = frame.iloc[1:].reset_index(drop=True)
    extra = frame.pop(len(names))
    # Each row may end with a separator, or none.
    is_longer = extra.notna() if extra.isna().any() else extra != ""
    frame.columns = names
    longer = _row_name(int(is_longer.argmax())) if is_longer.any() else ""
    # What this engine misses in a short row is NaN, whatever is asked for.
    return frame.fillna(""), longer


def _read_frame(path: Path, separator: str, **options: Any) -> pd.DataFrame:
    # An expression may take for ever at a line.
    is_expression = len(separator) > 1
    limit = _LEAST_SECONDS + path.stat().st_size / _BYTES_PER_SECOND if is_expression else 0
    error = TimeoutError(f"it takes more than {limit:.0f} seconds of processor time")
    # Captions may say "nan" or "None"; they are text, whatever they look like.
    with time_limit(limit, error, of_processor=True):
        return pd.read_csv(
            path,
            sep=separator,
            compression=None,
            dtype=str,
            keep_default_na=False,
            na_filter=False,
            **{"engine": "python" if is_expression else "c", **options},
        )


def _without_swallowed_rows(
    path: Path, frame: pd.DataFrame, is_broken: pd.Series, separator: str
) -> pd.DataFrame:
    """Read a table whose quotes seem to hold line breaks anew, or say where they do."""
    if (as_text := _read_as_text(path, separator, len(frame.columns))) is not None:
        return as_text
    rows = [_row_name(number) for number in is_broken.to_numpy().nonzero()[0].tolist()]
    logger.warning(
        "%s: quotes make one cell of several lines in %s: %s; where that is not meant, rows "
        "are lost: %s",
        path,
        counted(len(rows), "row"),
        ", ".join(rows[:_MAX_NAMED]) + (" ..." if len(rows) > _MAX_NAMED else ""),
        _ADVICE,
    )
    return frame


def _read_as_text(path: Path, separator: str, num_columns: int) -> pd.DataFrame | None:
    """Read a table with its quotes as text, None where a line needs them.

    None does that has all cells and ends no quote that an earlier one began.
    """
    counts: set[int] = set()
    with path.open(encoding="utf-8") as file:
        for line in file:
            cells = line.rstrip("\n").split(separator) if line.strip() else []
            # Within what is quoted, quotes come in pairs.
            closes = any(
                cell.endswith('"') and not cell.startswith('"') and cell.count('"') % 2
                for cell in cells
            )
            counts |= {-1 if closes else len(cells)} if cells else set()
    if counts != {num_columns} or num_columns == 1:
        return None
    logger.info("the quotes in %s are part of its text: no line needs them", path)
    return _read_frame(path, separator, quoting=csv.QUOTE_NONE)
