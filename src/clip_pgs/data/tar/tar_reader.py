"""Read the pairs of one shard in webdataset's layout: members `KEY.jpg` and `KEY.txt`."""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal, TypeVar

from webdataset.gopen import gopen

from clip_pgs.data.samples import CAPTION_SUFFIX, IMAGE_SUFFIXES, RawSample, Skip
from clip_pgs.data.tar.shards import is_remote, is_seekable

T = TypeVar("T")

# ValueError: a URL whose scheme webdataset cannot open. The last two: absurd sizes in headers.
_READING_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    MemoryError,
    OverflowError,
)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"}
_METADATA = re.compile(r"__[^/]*__($|/)")


class StrictTarInfo(tarfile.TarInfo):
    """Raise where tarfile would take a damaged header for the end of the archive."""

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
        return member


def read_shard(
    shard: str, *, visit: int = 0, with_images: bool = True
) -> Iterator[RawSample | Skip]:
    """Read a shard's pairs in order; only images and captions are read, nothing is decoded.

    Consecutive members that share the name up to the first dot are one pair. What was read before
    a shard turns out to be damaged is kept.

    Args:
        shard: A local file, a URL or a `pipe:` command.
        visit: Passed on to the samples.
        with_images: Read the images too; without them, captions come without the wait.

    Yields:
        Pairs, each possibly without image or caption. At least one item: a `Skip` without key
        says that the shard is empty, or cannot be read from here on.
    """
    suffixes = (*IMAGE_SUFFIXES, CAPTION_SUFFIX) if with_images else (CAPTION_SUFFIX,)
    for item in group_members(shard, _read_members(shard, suffixes)):
        if isinstance(item, Skip):
            yield item
        else:
            key, members = item
            image = image_of(members)
            yield RawSample(shard, key, image, members.get(CAPTION_SUFFIX), visit)


def group_members(
    shard: str, members: Iterator[tuple[str, str, T]]
) -> Iterator[tuple[str, dict[str, T]] | Skip]:
    """Group a shard's members into pairs.

    Args:
        shard: Its name, for the last item.
        members: Key, suffix and anything else of each; may raise what reading raises.

    Yields:
        Key and members by suffix. At last, where it applies, a `Skip`: the shard is empty, or
        cannot be read from here on.
    """
    key = ""
    group: dict[str, T] = {}
    failure = Skip(shard, "", "empty shard")
    while True:
        try:
            name, suffix, member = next(members)
        except StopIteration:
            break
        except _READING_ERRORS as error:
            failure = unreadable_shard(shard, error)
            break
        # Shards written by a merge may hold two pairs of one name in a row.
        if key and (name != key or suffix in group):
            yield key, group
            group = {}
        key = name
        group[suffix] = member
    if key:
        yield key, group
    if not key or failure.reason == "unreadable shard":
        yield failure


def unreadable_shard(shard: str, error: Exception, *, key: str = "") -> Skip:
    """Return what is recorded of a shard, or of a sample in it, that cannot be read."""
    detail = str(error).replace("\n", " ") or type(error).__name__
    return Skip(shard, key, "unreadable shard", detail)


def image_of(members: dict[str, T]) -> T | None:
    """Return the image among the members of a pair, by suffix."""
    return next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), None)


def open_plain_tar(file: BinaryIO) -> tarfile.TarFile:
    """Open an archive that is not compressed.

    Raises:
        tarfile.ReadError: If it is, or is no archive.
    """
    start = file.read(8)
    file.seek(0)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise tarfile.ReadError(f"compressed with {name}; unpack it, or let its name say so")
    return tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo)


def regular_members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Yield key, suffix and header of each file that belongs to a pair."""
    # In an archive without members, Python 3.10 would look in front of the file for the next one.
    if tar.offset == 0:
        return
    while (member := tar.next()) is not None:
        # TarFile remembers every member it has seen.
        tar.members.clear()  # type: ignore[attr-defined]
        _check_size(member)
        names = split_name(member.name) if member.isreg() else None
        if names is not None:
            yield *names, member


def split_name(name: str) -> tuple[str, str] | None:
    """Return the key and the lower-case suffix of a member's name, None if it is no pair's."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or _METADATA.match(name):
        return None
    return folder + slash + stem, suffix.lower()


def _check_size(member: tarfile.TarInfo) -> None:
    # tarfile would go back by as much, and come to the same member for ever.
    if member.size < 0:
        raise tarfile.ReadError(f"a member of {member.size} bytes")


def _open_tar(file: BinaryIO, shard: str) -> tarfile.TarFile:
    if is_seekable(shard):
        return open_plain_tar(file)
    # Members that are not used are seeked over in a file, but a pipe must read them.
    mode: Literal["r|*", "r:*"] = "r|*" if is_remote(shard) else "r:*"
    return tarfile.open(fileobj=file, mode=mode, tarinfo=StrictTarInfo)


def _read_members(shard: str, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield key, suffix and, if the suffix is one of these, the bytes of each file."""
    with (
        gopen(shard) if is_remote(shard) else open(shard, "rb") as file,
        _open_tar(file, shard) as tar,
    ):
        for key, suffix, member in regular_members(tar):
            extracted = tar.extractfile(member) if suffix in suffixes else None
            yield key, suffix, extracted.read() if extracted else None
