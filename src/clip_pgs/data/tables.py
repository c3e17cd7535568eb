"""Tables of image paths and captions (CSV and the like)."""

from __future__ import annotations

import lzma
import tarfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

# pandas unpacks a table that is named like an archive.
_READING_ERRORS = (
    ValueError,
    OSError,
    EOFError,
    pd.errors.ParserError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


@dataclass(frozen=True)
class PairTable:
    """The pairs of a table, row by row.

    Args:
        path: The table's file.
        images: Image paths as written there.
        captions: Captions; empty where the cell is.
    """

    path: Path
    images: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.images)


def default_separator(path: Path) -> str:
    """Return the separator that a table's name stands for: a tab for `.tsv`, else a comma."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def read_pairs(path: Path, *, image_key: str, caption_key: str, separator: str) -> PairTable:
    """Read the image and caption columns of a table.

    Args:
        path: A text file in UTF-8 with a header line.
        image_key: Name of the column of image paths.
        caption_key: Name of the column of captions.
        separator: What stands between columns.

    Raises:
        ValueError: If the file is missing, is no such table, lacks a column or has no rows.
    """
    frame = _read_columns(path, (image_key, caption_key), separator)
    return PairTable(path, frame[image_key].tolist(), frame[caption_key].tolist())


def read_captions(path: Path, *, caption_key: str, separator: str) -> list[str]:
    """Read the captions of a table; see `read_pairs`."""
    return _read_columns(path, (caption_key,), separator)[caption_key].tolist()


def _read_columns(path: Path, keys: tuple[str, ...], separator: str) -> pd.DataFrame:
    if not path.is_file():
        raise ValueError(f"table {str(path)!r} does not exist")
    try:
        # Captions may say "nan" or "None"; they are text, whatever they look like.
        frame = pd.read_csv(
            path, sep=separator, dtype=str, keep_default_na=False, na_filter=False, engine="c"
        )
    except _READING_ERRORS as error:
        raise ValueError(f"table {str(path)!r} cannot be read: {str(error).strip()}") from error
    for key in keys:
        if key not in frame.columns:
            columns = ", ".join(repr(str(column)) for column in frame.columns)
            raise ValueError(
                f"table {str(path)!r} has no column {key!r}; with separator {separator!r} "
                f"it has {columns}"
            )
    if frame.empty:
        raise ValueError(f"table {str(path)!r} has no rows")
    return frame
