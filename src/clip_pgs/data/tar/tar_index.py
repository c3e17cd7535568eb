"""Where each pair of a shard lies, so that it can be read without what comes before it."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from clip_pgs.data.samples import CAPTION_SUFFIX, IMAGE_SUFFIXES, RawSample, Skip
from clip_pgs.data.tar.tar_headers import UnusualArchiveError, list_plain_files
from clip_pgs.data.tar.tar_reader import (
    group_members,
    image_of,
    open_plain_tar,
    regular_members,
    split_name,
    unreadable_shard,
)

_USED_SUFFIXES = (*IMAGE_SUFFIXES, CAPTION_SUFFIX)
_ABSENT = (-1, 0)


class _Extent(NamedTuple):
    """Where a member's bytes lie; a sparse one's pieces are (offset in the file, bytes)."""

    offset: int
    size: int
    pieces: tuple[tuple[int, int], ...] | None = None

    @property
    def stored_size(self) -> int:
        """Bytes in the archive."""
        return self.size if self.pieces is None else sum(size for _, size in self.pieces)


@dataclass(frozen=True)
class ShardIndex:
    """The pairs of one shard, in order, as `read_shard` would give them.

    Args:
        shard: Its path.
        keys: Names of the S pairs. Shape (S,), bytes.
        extents: Offset and size of image and caption, offset -1 where there is none.
            Shape (S, 4), int64.
        failure: Why there are no more pairs, where there should be.
        sparse: The pieces of members with holes, by offset and then size.
    """

    shard: str
    keys: np.ndarray
    extents: np.ndarray
    failure: Skip | None = None
    sparse: dict[tuple[int, int], _Extent] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, file: int, number: int, *, visit: int = 0) -> RawSample | Skip:
        """Read one pair.

        Args:
            file: File descriptor of the shard.
            number: Which, in [0, S).
            visit: Passed on to the sample.
        """
        key = self.keys[number].decode("utf-8", "surrogateescape")
        image_start, image_size, caption_start, caption_size = self.extents[number].tolist()
        try:
            image = self._read(file, image_start, image_size)
            caption = self._read(file, caption_start, caption_size)
        except (OSError, EOFError) as error:
            return unreadable_shard(self.shard, error, key=key)
        return RawSample(self.shard, key, image, caption, visit)

    def _read(self, file: int, offset: int, size: int) -> bytes | None:
        if offset < 0:
            return None
        extent = self.sparse.get((offset, size))
        if extent is None or extent.pieces is None:
            return _read_exactly(file, offset, size)
        stored = _read_exactly(file, offset, extent.stored_size)
        whole = bytearray(size)
        position = 0
        for start, length in extent.pieces:
            whole[start : start + length] = stored[position : position + length]
            position += length
        return bytes(whole)


def index_shard(shard: str) -> ShardIndex:
    """Find the pairs of a local shard that is not compressed; what is wrong is in `failure`."""
    try:
        file = os.open(shard, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        return empty_index(unreadable_shard(shard, error))
    try:
        return index_file(shard, file)
    finally:
        os.close(file)


def empty_index(failure: Skip) -> ShardIndex:
    """Return the index of a shard that cannot be read."""
    return ShardIndex(failure.shard, np.empty(0, "S1"), np.empty((0, 4), np.int64), failure)


def index_file(shard: str, file: int) -> ShardIndex:
    """Find the pairs of an open shard; see `index_shard`."""
    keys: list[bytes] = []
    extents: list[tuple[int, ...]] = []
    sparse: dict[tuple[int, int], _Extent] = {}
    failure: Skip | None = None
    for item in group_members(shard, _list_members(file)):
        if isinstance(item, Skip):
            failure = item
            continue
        key, members = item
        image, caption = image_of(members), members.get(CAPTION_SUFFIX)
        keys.append(key.encode("utf-8", "surrogateescape"))
        extents.append((*(image or _ABSENT)[:2], *(caption or _ABSENT)[:2]))
        for extent in (image, caption):
            if extent is not None and extent.pieces is not None:
                sparse[extent.offset, extent.size] = extent
    table = np.array(extents, np.int64).reshape(-1, 4)
    return ShardIndex(shard, np.array(keys, np.bytes_), table, failure, sparse)


def _list_members(file: int) -> Iterator[tuple[str, str, _Extent]]:
    try:
        plain = list_plain_files(file)
    except UnusualArchiveError:
        yield from _list_any_members(file)
        return
    for name, offset, size in plain:
        names = split_name(name)
        if names is not None:
            yield *names, _Extent(offset, size)


def _list_any_members(file: int) -> Iterator[tuple[str, str, _Extent]]:
    file_size = os.fstat(file).st_size
    with open(file, "rb", closefd=False) as stream, open_plain_tar(stream) as tar:
        for key, suffix, member in regular_members(tar):
            extent = _Extent(member.offset_data, member.size, _pieces(member))
            if suffix in _USED_SUFFIXES and extent.offset + extent.stored_size > file_size:
                raise tarfile.ReadError("unexpected end of data")
            yield key, suffix, extent


def _pieces(member: tarfile.TarInfo) -> tuple[tuple[int, int], ...] | None:
    # Typeshed knows the holes' list as bytes.
    sparse: Any = member.sparse
    return None if sparse is None else tuple((start, size) for start, size in sparse)


def _read_exactly(file: int, offset: int, size: int) -> bytes:
    data = os.pread(file, size, offset)
    while len(data) < size:
        # A call gives at most 2 GiB, and may give less.
        more = os.pread(file, size - len(data), offset + len(data))
        if not more:
            raise EOFError("the shard was cut short after it was first read")
        data += more
    return data
