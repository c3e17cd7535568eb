"""Checksums of a folder's checkpoints, as `sha256sum -c SHA256SUMS` checks them too."""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from pathlib import Path

SUMS_NAME = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_CHUNK_BYTES = 1 << 20


def read_sums(folder: Path) -> list[tuple[str, str]]:
    """Return a folder's list of (file name, SHA-256), oldest first.

    A name is there twice while its file is being replaced.
    """
    path = folder / SUMS_NAME
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8", errors="replace")
    matches = [_LINE.fullmatch(line) for line in text.splitlines()]
    return [(match[2], match[1]) for match in matches if match]


def check_sum(path: Path) -> None:
    """Compare a checkpoint with the checksum that its folder lists.

    A file that is not listed, such as OpenCLIP's, is checked against the checksums that every
    zip archive has inside.

    Raises:
        ValueError: If they differ.
    """
    digests = [digest for name, digest in read_sums(path.parent) if name == path.name]
    if digests:
        if _file_digest(path) not in digests:
            raise ValueError(
                f"checkpoint {str(path)!r} is damaged: its checksum is not the one in {SUMS_NAME}"
            )
        return
    try:
        damaged = _damaged_record(path)
    # The last where a damaged header asks for a compression that zipfile does not know.
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError) as error:
        raise ValueError(f"checkpoint {str(path)!r} is damaged: {error}") from error
    if damaged is not None:
        raise ValueError(
            f"checkpoint {str(path)!r} is damaged: the checksum of {damaged!r} in it is wrong"
        )


def _damaged_record(path: Path) -> str | None:
    # Files from before torch 1.6 are no archives and have no checksums.
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


def _file_digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
