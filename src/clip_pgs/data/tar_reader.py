"""Read the pairs of one shard in webdataset's layout: members `KEY.jpg` and `KEY.txt`."""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterator

from webdataset.gopen import gopen

from clip_pgs.data.samples import CAPTION_SUFFIX, IMAGE_SUFFIXES, RawSample, Skip
from clip_pgs.data.shards import is_remote

# ValueError: a URL whose scheme webdataset cannot open.
_READING_ERRORS = (OSError, EOFError, ValueError, tarfile.TarError, zlib.error, lzma.LZMAError)
_METADATA = re.compile(r"__[^/]*__($|/)")


class _StrictTarInfo(tarfile.TarInfo):
    """Raise where tarfile would take a damaged header for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _StrictTarInfo:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf and not any(buf):
                # The block of zeros that does end an archive.
                raise
            raise tarfile.ReadError(f"damaged or cut short: {error}") from error


def read_shard(shard: str, *, visit: int = 0) -> Iterator[RawSample | Skip]:
    """Read a shard's pairs in order; only images and captions are read, nothing is decoded.

    Consecutive members that share the name up to the first dot are one pair. What was read before
    a shard turns out to be damaged is kept.

    Args:
        shard: A local file, a URL or a `pipe:` command.
        visit: Passed on to the samples.

    Yields:
        Pairs, each possibly without image or caption. At least one item: a `Skip` without key
        says that the shard is empty, or cannot be read from here on.
    """
    key = ""
    members: dict[str, bytes | None] = {}
    failure = Skip(shard, "", "empty shard")
    members_of_shard = _read_members(shard)
    while True:
        try:
            name, suffix, data = next(members_of_shard)
        except StopIteration:
            break
        except _READING_ERRORS as error:
            detail = str(error).replace("\n", " ") or type(error).__name__
            failure = Skip(shard, "", "unreadable shard", detail)
            break
        # Shards written by a merge may hold two pairs of one name in a row.
        if key and (name != key or suffix in members):
            yield _make_sample(shard, key, members, visit)
            members = {}
        key = name
        members[suffix] = data
    if key:
        yield _make_sample(shard, key, members, visit)
    if not key or failure.reason == "unreadable shard":
        yield failure


def _make_sample(shard: str, key: str, members: dict[str, bytes | None], visit: int) -> RawSample:
    images = (members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members)
    return RawSample(shard, key, next(images, None), members.get(CAPTION_SUFFIX), visit)


def _read_members(shard: str) -> Iterator[tuple[str, str, bytes | None]]:
    """Yield key, suffix and, if it is an image or a caption, the bytes of each file."""
    # Members that are not used are seeked over in a file, but a pipe must read them.
    remote = is_remote(shard)
    with (
        gopen(shard) if remote else open(shard, "rb") as file,
        tarfile.open(fileobj=file, mode="r|*" if remote else "r:*", tarinfo=_StrictTarInfo) as tar,
    ):
        while (member := tar.next()) is not None:
            # TarFile remembers every member it has seen.
            tar.members.clear()  # type: ignore[attr-defined]
            folder, slash, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if not member.isreg() or not stem or not dot or _METADATA.match(member.name):
                continue
            suffix = suffix.lower()
            used = suffix in IMAGE_SUFFIXES or suffix == CAPTION_SUFFIX
            extracted = tar.extractfile(member) if used else None
            yield folder + slash + stem, suffix, extracted.read() if extracted else None
