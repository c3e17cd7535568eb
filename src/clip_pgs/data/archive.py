"""Tar archives that may come from anybody, member by member.

Python's tarfile takes a damaged header for the end, believes any size, and reads headers and maps
of holes of any length; here all of that is a `tarfile.ReadError`.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from itertools import chain
from typing import Any, BinaryIO, Literal

from clip_pgs.data.shards import is_remote, is_seekable

# Of a header that extends another, and of all of a member: names take a few hundred bytes, and a
# map of holes a few thousand.
_MAX_HEADER_BYTES = 2**20
# Bytes. An index takes as much for each name as for the longest.
_MAX_NAME = 1024
_EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
_METADATA = re.compile(r"__[^/]*__($|/)")
_HEAD_BYTES, _SHOWN_BYTES = 512, 32
# What may follow the end of an archive: zeros, as many as fill tar's largest usual record.
_MAX_PADDING = 2**16
# Reads in a row at the end of a stream: tarfile takes a few.
_MAX_EMPTY_READS = 16


class StrictTarInfo(tarfile.TarInfo):
    """Raise where tarfile would take a damaged header for the end, or believe an absurd size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> StrictTarInfo:
        """Make a member of its header."""
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf and not any(buf):
                # The block of zeros that does end an archive.
                raise
            raise tarfile.ReadError(f"damaged or cut short: {error}") from error
        _check_size(member)
        if member.type in _EXTENSIONS and member.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {member.size} bytes")
        return member

    def _proc_member(self, tar: Any) -> Any:
        # Python leaves this one to be overridden. It reads a map of holes of any length, and calls
        # itself for each header that extends another.
        file = tar.fileobj
        if isinstance(file, _Headers):
            return super()._proc_member(tar)  # type: ignore[misc]
        tar.fileobj = _Headers(file)
        try:
            return super()._proc_member(tar)  # type: ignore[misc]
        finally:
            tar.fileobj = file


class _Headers:
    """A file of which a member's headers are read, as far as a member may have such."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self._left = _MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        """Return at most so many bytes."""
        self._left -= size
        if self._left < 0:
            raise tarfile.ReadError(f"headers of more than {_MAX_HEADER_BYTES} bytes")
        return self._file.read(size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class _Stream:
    """A stream of which the first bytes were read and are given out again; it ends once.

    tarfile would look for the end of a member of 2^50 bytes behind the end of its stream.
    """

    def __init__(self, file: BinaryIO, head: bytes = b"") -> None:
        self._file = file
        self._head = head
        self._empty_reads = 0

    def read(self, size: int) -> bytes:
        """Return at most so many bytes."""
        head, self._head = self._head[:size], self._head[size:]
        data = head or self._file.read(size)
        self._empty_reads = 0 if data else self._empty_reads + 1
        if self._empty_reads > _MAX_EMPTY_READS:
            raise tarfile.ReadError("unexpected end of data")
        return data


def stream_tar(file: BinaryIO, head: bytes = b"") -> tarfile.TarFile:
    """Open an archive that is read once from its beginning, compressed or not.

    Args:
        file: What is left of it.
        head: What was read of it before.

    Raises:
        tarfile.TarError: If it is none.
    """
    stream: Any = _Stream(file, head)
    return tarfile.open(fileobj=stream, mode="r|*", tarinfo=StrictTarInfo)


def open_archive(file: BinaryIO, shard: str) -> tarfile.TarFile:
    """Open a shard's archive, or say what is there instead."""
    head = file.read(_HEAD_BYTES)
    try:
        if is_remote(shard):
            return stream_tar(file, head)
        file.seek(0)
        mode: Literal["r:", "r:*"] = "r:" if is_seekable(shard) else "r:*"
        return tarfile.open(fileobj=file, mode=mode, tarinfo=StrictTarInfo)
    except tarfile.TarError as error:
        start, reason = head[:_SHOWN_BYTES], str(error).partition(":\n")[0]
        raise tarfile.ReadError(
            f"it begins with {start!r} and is no whole tar archive ({reason}); compressed "
            "ones are named .tar.gz, .tar.bz2 or .tar.xz; training takes a table by --dataset-type "
            "csv, and `clip-pgs data pack` makes shards of one"
        ) from None


def regular_members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield key (the name up to its first dot), suffix and header of each file of a pair.

    Raises:
        tarfile.ReadError: If a size or a name is absurd, or more than padding follows the end.
    """
    # In an archive without members, Python 3.10 would look in front of the file for the next one.
    if tar.offset == 0:
        return
    while (member := tar.next()) is not None:
        # TarFile remembers every member it has seen, and what was said of all that follow.
        tar.members.clear()  # type: ignore[attr-defined]
        if sum(map(len, chain(*tar.pax_headers.items()))) > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"global headers of more than {_MAX_HEADER_BYTES} bytes")
        _check_size(member)
        num_bytes = len(member.name.encode("utf-8", "surrogateescape"))
        if num_bytes > _MAX_NAME:
            raise tarfile.ReadError(f"a name of {num_bytes} bytes, more than {_MAX_NAME}")
        folder, slash, base = member.name.rpartition("/")
        stem, dot, suffix = base.partition(".")
        if member.isreg() and stem and dot and not _METADATA.match(member.name):
            yield folder + slash + stem, suffix.lower(), member
    _check_end(tar)


def _check_end(tar: tarfile.TarFile) -> None:
    # Archives that were appended to each other, or a download of which a piece is missing.
    assert tar.fileobj is not None
    rest = tar.fileobj.read(_MAX_PADDING + 1)
    if len(rest) > _MAX_PADDING or any(rest):
        what = "other data follow" if any(rest) else f"more than {_MAX_PADDING} zeros follow"
        raise tarfile.ReadError(
            f"{what} the end of the archive, at byte {tar.offset}; fetch it again, or write what "
            "was appended as a shard of its own"
        )


def _check_size(member: tarfile.TarInfo) -> None:
    # tarfile would go back by as much, and come to the same member for ever.
    if member.size < 0:
        raise tarfile.ReadError(f"a member of {member.size} bytes")
