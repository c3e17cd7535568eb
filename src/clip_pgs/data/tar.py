"""Webdataset shards: their pairs, read in order or at random through an index.

Consecutive members of one name up to the first dot, such as KEY.jpg and KEY.txt, are a pair. A
stream is read from its beginning. A local file that is not compressed is indexed once, by
`tarfile`; the index is kept beside the shard as `.NAME.index`, or in the user's cache where that
folder cannot be written, and holds until the file changes: a tool can set its time to what it was
and rewrite it at its size, but the time of the change of its inode (ctime) is the system's own.

A shard may come from anybody: images and captions alone are read, up to a size that those of a
pair have together, and whatever is wrong is a `Skip`.
"""

from __future__ import annotations

import hashlib
import logging
import os
import resource
import tarfile
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any, BinaryIO, TypeVar
from zipfile import ZIP_STORED

import numpy as np

from clip_pgs.common import one_sentence
from clip_pgs.data.archive import StrictTarInfo, open_archive, regular_members
from clip_pgs.data.bad_samples import Skip, StalledDataError
from clip_pgs.data.commands import LostProcessError, open_remote, worker_processes
from clip_pgs.data.decoding import MAX_IMAGE_BYTES
from clip_pgs.data.order import MAX_LANES, SampleRef
from clip_pgs.data.samples import (
    CAPTION_SUFFIX,
    IMAGE_SUFFIXES,
    JSON_SUFFIX,
    MAX_CAPTION_BYTES,
    MAX_CAPTIONS,
    RawSample,
    is_image,
)
from clip_pgs.data.shards import cached_index, is_remote, stated_sizes
from clip_pgs.files import atomic_file, file_state
from clip_pgs.tables import counted

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Of one pair. A compressed shard holds members without content nearly for free.
_MAX_MEMBERS = 2 * MAX_CAPTIONS

_CACHE_VERSION = 4
# A smaller shard is indexed in a moment.
_MIN_CACHED = 200
# One for each lane, and for some that change over from one shard to the next.
_MAX_OPEN = MAX_LANES + 64
_SECONDS_ALONE = 2.0
_SECONDS_BETWEEN_REPORTS = 10.0
# Shards that each process is given before it asks.
_NUM_AHEAD = 4
# A file server may be away for a moment.
_SECONDS_BEFORE_RETRY = 10.0
# A run asks for the same shards again in its checks and in each of its phases.
_counted: dict[tuple[str, int, int, int], tuple[int, Skip | None, str | None]] = {}
_SHOWN = 12  # of the digits of a digest, as much as tells shards apart


def read_shard(
    shard: str, *, repeat: int = 0, use_json: bool = False, with_images: bool = True
) -> Iterator[RawSample | Skip]:
    """Read a shard's pairs in order; nothing is decoded.

    What was read before a shard turns out to be damaged is kept.

    Args:
        shard: A local file, a URL or a `pipe:` command.
        repeat: Passed on to the samples.
        use_json: Take the side-car JSON for the caption.
        with_images: Read the images too; else they are empty, and captions come without the wait.

    Yields:
        Pairs, each possibly without image or caption, or a `Skip` in the place of one that is too
        large. At least one item: a `Skip` without key says that the shard is empty, or cannot be
        read from here on.
    """

    def members() -> Iterator[tuple[bool, str, str, bytes | int]]:
        with (
            open_remote(shard) if is_remote(shard) else open(shard, "rb") as file,
            open_archive(file, shard) as tar,
        ):
            sizes: dict[str, int] = {}
            for is_first, key, suffix, member in _pair_members(tar):
                sizes = {} if is_first else sizes
                data: bytes | int = member.size
                if not with_images and suffix in IMAGE_SUFFIXES:
                    data = b""
                elif (kind := _kind(suffix, use_json)) is not None:
                    # Only at the end of a sample is it known whether it has a KEY.txt.
                    share = suffix if suffix == CAPTION_SUFFIX else kind
                    sizes[share] = sizes.get(share, 0) + member.size
                    if sizes[share] <= _max_bytes(kind):
                        extracted = tar.extractfile(member)
                        data = extracted.read() if extracted else b""
                yield is_first, key, suffix, data

    for item in _group_members(shard, members()):
        if isinstance(item, Skip):
            yield item
            continue
        key, group = item
        sizes = {name: part if isinstance(part, int) else len(part) for name, part in group.items()}
        skip = _too_large(shard, key, sizes, use_json)
        yield skip or _make_sample(shard, key, group, repeat, use_json)


def unreadable_shard(shard: str, error: Exception, *, key: str = "") -> Skip:
    """Return what is recorded of a shard, or of a sample in it, that cannot be read."""
    return Skip(shard, key, "unreadable shard", one_sentence(error))


@dataclass(frozen=True)
class ShardIndex:
    """Where the members of a shard's pairs lie, in the order of `read_shard`.

    Args:
        shard: Its path.
        keys: Names of the S pairs as bytes, shape (S,).
        ends: Where the members of each end, shape (S,), int64.
        members: Number of the suffix, offset and size of the M members, shape (M, 3), int64; the
            offset `-1 - H` stands for a member with holes whose header is at H.
        suffixes: By their numbers.
        failure: Why there are no more pairs, where there should be.
        is_transient: Whether the system gave no more of the file; it may at another time.
    """

    shard: str
    keys: np.ndarray
    ends: np.ndarray
    members: np.ndarray
    suffixes: list[str]
    failure: Skip | None = None
    is_transient: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    def is_sound(self) -> bool:
        """Return whether the parts fit each other: those out of a file may not."""
        kinds = self.members[:, 0]
        return (
            self.keys.dtype.kind == "S"
            and self.keys.shape == self.ends.shape
            and self.members.shape[1:] == (3,)
            and {self.ends.dtype, self.members.dtype} == {np.dtype(np.int64)}
            and bool((np.diff(self.ends, prepend=0, append=len(self.members)) >= 0).all())
            and bool(((kinds >= 0) & (kinds < len(self.suffixes))).all())
            and bool((self.members[:, 2] >= 0).all())
        )

    def digest(self) -> str:
        """Return what tells this index from that of other pairs: by their names, places, sizes."""
        digest = hashlib.sha256("/".join(self.suffixes).encode("utf-8", "surrogateescape"))
        for part in (self.keys, self.ends, self.members):
            digest.update(f"{part.dtype.str} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:_SHOWN]

    def read(
        self, file: BinaryIO, number: int, *, repeat: int = 0, use_json: bool = False
    ) -> RawSample | Skip:
        """Read one pair.

        Args:
            file: The shard, opened.
            number: Which, in [0, S).
            repeat: Passed on to the sample.
            use_json: Take the side-car JSON for the caption.
        """
        key = bytes(self.keys[number]).decode("utf-8", "surrogateescape")
        start = self.ends[number - 1] if number else 0
        members = self.members[start : self.ends[number]].tolist()
        places = {self.suffixes[kind]: (offset, size) for kind, offset, size in members}
        sizes = {suffix: size for suffix, (_, size) in places.items()}
        if (skip := _too_large(self.shard, key, sizes, use_json)) is not None:
            return skip
        group: dict[str, bytes | int] = {**sizes}
        try:
            for suffix in chain(*_members_read(places, use_json).values()):
                group[suffix] = _read_member(file, *places[suffix])
        except StalledDataError:
            raise
        except Exception as error:
            return unreadable_shard(self.shard, error, key=key)
        return _make_sample(self.shard, key, group, repeat, use_json)


class ShardSource:
    """The samples of local shards, in any order; shards in use stay open, with their indexes.

    A shard that gets other members meanwhile, or others than `index_shards` found before, is bad.
    One that the system does not give is tried again after some seconds.

    Args:
        shards: Expanded local shards that are not compressed.
        use_json: Take the side-car JSON for the caption.
    """

    def __init__(self, shards: list[str], *, use_json: bool = False) -> None:
        self.shards = shards
        self.use_json = use_json
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        # Of each shard's index when it was first seen.
        self._digests = index_digests(shards)
        # Others in this process need files too.
        self._max_open = min(_MAX_OPEN, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    def read(self, ref: SampleRef) -> RawSample | Skip:
        """Read one sample of a shard."""
        index, file = self._opened(ref.shard)
        if ref.number < len(index):
            return index.read(file, ref.number, repeat=ref.repeat, use_json=self.use_json)
        key = f"sample {ref.number + 1}"
        if index.failure is not None:
            return Skip(index.shard, key, index.failure.reason, index.failure.detail)
        detail = f"the shard has {len(index)}, fewer than its sizes.json says"
        return Skip(index.shard, key, "no such sample", detail)

    def describe(self, shard: int, number: int) -> str:
        """Return the shard and the number of the sample."""
        return f"{self.shards[shard]}: sample {number + 1}"

    def _opened(self, number: int) -> tuple[ShardIndex, BinaryIO]:
        if number in self._open and not self._open[number].is_current():
            self._open.pop(number).file.close()
        if number not in self._open:
            while len(self._open) >= self._max_open:
                self._open.popitem(last=False)[1].file.close()
            index, file = _open_shard(self.shards[number])
            if not index.is_transient:
                digest = self._digests[number] or index.digest()
                self._digests[number] = digest
                # What is left of a damaged one is what it was.
                if index.failure is None and index.digest() != digest:
                    detail = "its members are others than at first; a run keeps to its data"
                    index = _to_index(index.shard, [Skip(index.shard, "", "changed shard", detail)])
            self._open[number] = _OpenShard(index, file, _stamp(file), monotonic())
        self._open.move_to_end(number)
        opened = self._open[number]
        return opened.index, opened.file

    def __getstate__(self) -> dict[str, Any]:
        # Another process opens its own.
        return {**self.__dict__, "_open": OrderedDict()}


@dataclass(frozen=True)
class _OpenShard:
    """A shard in use: its index, file and stamp, and when it was opened."""

    index: ShardIndex
    file: BinaryIO
    stamp: tuple[int, int] | None
    opened_at: float

    def is_current(self) -> bool:
        """Return whether it is still as it was, and need not be tried again."""
        if self.index.is_transient and monotonic() - self.opened_at > _SECONDS_BEFORE_RETRY:
            return False
        # Where somebody writes into it, its members may lie elsewhere.
        return _stamp(self.file) == self.stamp


def size_shards(shards: list[str], *, use_stated: bool = True) -> tuple[list[int], list[Skip]]:
    """Return how many samples each shard holds, and what is wrong with those that were counted.

    Args:
        shards: Local shards that are not compressed.
        use_stated: Believe the `sizes.json` in a shard's folder; shards it leaves out are
            counted, and so are all where there is none.

    Raises:
        ValueError: If a `sizes.json` cannot be understood.
    """
    stated = stated_sizes(shards) if use_stated else {}
    unknown = list(dict.fromkeys(shard for shard in shards if shard not in stated))
    found = index_shards(unknown)
    sizes = [stated[shard] if shard in stated else found[shard][0] for shard in shards]
    return sizes, [skip for _, skip in found.values() if skip is not None]


def misstated_sizes(stated: dict[str, int], held: dict[str, int]) -> str:
    """Say where `sizes.json` is wrong, and what is lost by it; "" where it is right.

    Args:
        stated: Samples of shards, as a run takes them; see `size_shards`.
        held: Samples that some of them hold.
    """
    wrong = [shard for shard, number in held.items() if stated[shard] != number]
    if not wrong:
        return ""
    path, num_more = Path(wrong[0]), len(wrong) - 1
    num_lost = sum(max(0, held[shard] - stated[shard]) for shard in wrong)
    text = (
        f"{path.parent / 'sizes.json'} says that {path.name} has "
        f"{counted(stated[wrong[0]], 'sample')}, but it has {held[wrong[0]]}"
    )
    if num_more:
        text += f", and is wrong about {counted(num_more, 'more shard')}"
    return text + (f"; {counted(num_lost, 'sample')} left out of each epoch" if num_lost else "")


def index_shards(shards: list[str], *, start: int = 0) -> dict[str, tuple[int, Skip | None]]:
    """Index shards and keep the indexes; say now and then how far it is.

    What takes more than a moment is done in as many processes as there are cores. Several callers
    that begin at different places share the work through the indexes they keep.

    Args:
        shards: Local shards that are not compressed.
        start: Where in the list to begin; it goes around.

    Returns:
        Samples of each shard, and what is wrong with it.
    """
    order = list(dict.fromkeys([*shards[start:], *shards[:start]]))
    found: dict[str, tuple[int, Skip | None, str | None]] = {}
    begun = reported = monotonic()
    while len(found) < len(order) and monotonic() - begun < _SECONDS_ALONE:
        shard = order[len(found)]
        found[shard] = _count(shard)
    rest = deque(order[len(found) :])
    if rest:
        num_processes = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        num_processes = min(max(1, num_processes - 1), len(rest))
        # What is left where one of them is killed, or none can be had, is done below.
        lost, workers = suppress(LostProcessError), worker_processes(num_processes, "index shards")
        with lost, workers as executor:
            begun_there: deque[tuple[str, Future[Any]]] = deque()
            while executor is not None and (rest or begun_there):
                while rest and len(begun_there) < _NUM_AHEAD * num_processes:
                    shard = rest.popleft()
                    begun_there.append((shard, executor.submit(_count, shard)))
                # This process works, too: from the other end.
                if rest:
                    shard = rest.pop()
                    found[shard] = _count(shard)
                while begun_there and (not rest or begun_there[0][1].done()):
                    shard, future = begun_there.popleft()
                    found[shard] = future.result()
                if monotonic() - reported > _SECONDS_BETWEEN_REPORTS:
                    reported = monotonic()
                    logger.info("indexed %d of %d shards", len(found), len(order))
    found.update((shard, _count(shard)) for shard in order if shard not in found)
    # One without a digest may hold more at another time.
    _counted.update((_state_of(shard), each) for shard, each in found.items() if each[2])
    return {shard: (size, failure) for shard, (size, failure, _) in found.items()}


def index_digests(shards: list[str]) -> list[str | None]:
    """Return a digest of the index of each shard that `index_shards` has seen as it is now."""
    known = (_counted.get(_state_of(shard)) for shard in shards)
    return [None if each is None else each[2] for each in known]


def _count(shard: str) -> tuple[int, Skip | None, str | None]:
    state = _state_of(shard)
    if state in _counted:
        return _counted[state]
    index = index_shard(shard)
    return len(index), index.failure, None if index.is_transient else index.digest()


def _state_of(shard: str) -> tuple[str, int, int, int]:
    try:
        return shard, *file_state(os.stat(shard))
    except (OSError, ValueError):
        return shard, -1, -1, -1


def index_shard(shard: str) -> ShardIndex:
    """Find the pairs of a local shard that is not compressed; what is wrong is in `failure`."""
    index, file = _open_shard(shard)
    file.close()
    return index


def _open_shard(shard: str) -> tuple[ShardIndex, BinaryIO]:
    """Return a shard's index and its file, an empty one where it cannot be opened."""
    try:
        file = open(shard, "rb")  # noqa: SIM115 - it stays open while it is in use
        return _index_file(shard, file), file
    except (OSError, ValueError) as error:
        index = _to_index(shard, [unreadable_shard(shard, error)])
        return replace(index, is_transient=True), open(os.devnull, "rb")


def _stamp(file: BinaryIO) -> tuple[int, int] | None:
    """Return size and time of an open file; one that is removed is still what it was."""
    # A file server may have forgotten it.
    with suppress(OSError):
        status = os.fstat(file.fileno())
        return status.st_size, status.st_mtime_ns
    return None


def _index_file(shard: str, file: BinaryIO) -> ShardIndex:
    """Find the pairs of an open shard, in its cached index where that is still true."""
    status = os.fstat(file.fileno())
    state = [_CACHE_VERSION, *file_state(status)]
    for path in filter(os.path.isfile, cache_paths(shard)):
        # Whatever is wrong with such a file, it is made anew.
        with suppress(Exception), np.load(path, allow_pickle=False) as kept:
            # Ours is not compressed, and takes no more memory than it has bytes.
            is_ours = all(part.compress_type == ZIP_STORED for part in kept.zip.infolist())
            if is_ours and kept["state"].tolist() == state:
                names = str(kept["suffixes"]).split("/")
                index = ShardIndex(shard, kept["keys"], kept["ends"], kept["members"], names)
                if index.is_sound():
                    return index
    index = _make_index(shard, file, status.st_size)
    if index.failure is None and len(index) >= _MIN_CACHED:
        arrays: dict[str, Any] = {
            "state": state,
            "keys": index.keys,
            "ends": index.ends,
            "members": index.members,
            # None holds a slash.
            "suffixes": "/".join(index.suffixes),
        }
        for path in cache_paths(shard):
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as new:
                    np.savez(new, **arrays)
                break
        else:
            _warn_of_cache(" or ".join(str(path.parent) for path in cache_paths(shard)))
    return index


def cache_paths(shard: str) -> list[Path]:
    """Return where a shard's index is kept: beside it, or else in the user's cache."""
    path = Path(shard)
    digest = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    paths = [cached_index(path)]
    # A user of a container may have no home.
    with suppress(RuntimeError):
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        paths.append(home / "clip_pgs" / "shards" / f"{digest}.index")
    return paths


def _pair_members(tar: tarfile.TarFile) -> Iterator[tuple[bool, str, str, tarfile.TarInfo]]:
    """Yield whether a pair begins, and key, suffix and header of each member; of too many, some."""
    key, suffixes = "", set[str]()
    for name, suffix, member in regular_members(tar):
        # Shards written by a merge may hold two pairs of one name in a row.
        is_first = name != key or suffix in suffixes
        if is_first:
            key, suffixes = name, set()
        if len(suffixes) <= _MAX_MEMBERS:
            suffixes.add(suffix)
            yield is_first, name, suffix, member


def _group_members(
    shard: str, members: Iterator[tuple[bool, str, str, T]]
) -> Iterator[tuple[str, dict[str, T]] | Skip]:
    """Yield key and members by suffix of each pair, and at last, where it applies, a `Skip`."""
    key = ""
    group: dict[str, T] = {}
    failure: Skip | None = None
    try:
        for is_first, name, suffix, member in members:
            if key and is_first:
                yield key, group
                group = {}
            key = name
            group[suffix] = member
    except StalledDataError:
        raise
    # Damaged archives and absurd numbers in headers make tarfile and decompressors raise anything.
    except Exception as error:
        failure = unreadable_shard(shard, error)
    if key:
        yield key, group
    elif failure is None:
        failure = Skip(shard, "", "empty shard")
    if failure is not None:
        yield failure


def _is_caption(suffix: str, use_json: bool) -> bool:
    if use_json:
        return suffix == JSON_SUFFIX
    return suffix.rpartition(".")[2] == CAPTION_SUFFIX


def _kind(suffix: str, use_json: bool) -> str | None:
    """Return whether a member is an image or a caption; None for others, which are not read."""
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "caption" if _is_caption(suffix, use_json) else None


def _members_read(suffixes: Iterable[str], use_json: bool) -> dict[str, list[str]]:
    """Return the images and the captions of a sample: KEY.txt, or else KEY.*.txt in their order."""
    names: dict[str, list[str]] = {"image": [], "caption": []}
    for suffix in sorted(suffixes):
        if (kind := _kind(suffix, use_json)) is not None:
            names[kind].append(suffix)
    if not use_json and CAPTION_SUFFIX in names["caption"]:
        names["caption"] = [CAPTION_SUFFIX]
    return names


def _max_bytes(kind: str) -> int:
    return MAX_IMAGE_BYTES if kind == "image" else MAX_CAPTION_BYTES


def _too_large(shard: str, key: str, sizes: dict[str, int], use_json: bool) -> Skip | None:
    """Refuse a sample by the sizes of its members: those of a kind count together."""
    if len(sizes) > _MAX_MEMBERS:
        return Skip(shard, key, "too many members", f"more than {_MAX_MEMBERS}")
    for kind, names in _members_read(sizes, use_json).items():
        own = [sizes[name] for name in names]
        if sum(own) > _max_bytes(kind):
            where = f" in {len(own)} members" if len(own) > 1 else ""
            detail = f"{sum(own)} bytes{where}, more than {_max_bytes(kind)}"
            return Skip(shard, key, f"too large {kind}", detail)
    return None


def _make_sample(
    shard: str, key: str, group: dict[str, bytes | int], repeat: int, use_json: bool
) -> RawSample:
    """Make a sample of its members by suffix: bytes, or the size of one that was not read."""
    read = {suffix: part for suffix, part in group.items() if not isinstance(part, int)}
    image = next((read[suffix] for suffix in IMAGE_SUFFIXES if suffix in read), None)
    captions = [read[suffix] for suffix in _members_read(read, use_json)["caption"]]
    # Images first: `clip-pgs data check` looks for a second one.
    ordered = sorted(group, key=lambda suffix: (not is_image(suffix), suffix))
    suffixes = " ".join(f".{suffix}" for suffix in ordered)[:200]
    return RawSample(shard, key, image, tuple(captions), repeat, suffixes)


@lru_cache
def _warn_of_cache(folders: str) -> None:
    logger.warning(
        "the index of a shard cannot be kept in %s, so that each worker makes its own; "
        "XDG_CACHE_HOME names another folder",
        folders,
    )


def _make_index(shard: str, file: BinaryIO, file_size: int) -> ShardIndex:
    is_transient = False

    def members() -> Iterator[tuple[bool, str, str, tarfile.TarInfo]]:
        nonlocal is_transient
        try:
            yield from _pair_members(open_archive(file, shard))
        except OSError:
            is_transient = True
            raise

    def extents() -> Iterator[tuple[bool, str, str, tuple[int, int]]]:
        for is_first, key, suffix, member in members():
            # Typeshed knows the list of what is between holes as bytes.
            pieces: Any = member.sparse
            stored = member.size if pieces is None else sum(size for _, size in pieces)
            is_used = suffix in IMAGE_SUFFIXES or _is_caption(suffix, use_json=False)
            if is_used and member.offset_data + stored > file_size:
                raise tarfile.ReadError("unexpected end of data")
            offset = member.offset_data if pieces is None else -1 - member.offset
            yield is_first, key, suffix, (offset, member.size)

    index = _to_index(shard, _group_members(shard, extents()))
    return replace(index, is_transient=is_transient)


def _to_index(
    shard: str, items: Iterable[tuple[str, dict[str, tuple[int, int]]] | Skip]
) -> ShardIndex:
    keys: list[bytes] = []
    ends: list[int] = []
    members: list[tuple[int, int, int]] = []
    kinds: dict[str, int] = {}
    failure: Skip | None = None
    for item in items:
        if isinstance(item, Skip):
            failure = item
            continue
        key, group = item
        keys.append(key.encode("utf-8", "surrogateescape"))
        members += [(kinds.setdefault(each, len(kinds)), *group[each]) for each in group]
        ends.append(len(members))
    table = np.array(members, np.int64).reshape(-1, 3)
    return ShardIndex(
        shard, np.array(keys, "S"), np.array(ends, np.int64), table, [*kinds], failure
    )


def _read_member(file: BinaryIO, offset: int, size: int) -> bytes:
    if offset < 0:
        return _read_with_holes(file, -1 - offset)
    data = os.pread(file.fileno(), size, offset)
    while len(data) < size:
        # A call may give less.
        more = os.pread(file.fileno(), size - len(data), offset + len(data))
        if not more:
            raise EOFError("the shard was cut short after it was first read")
        data += more
    return data


def _read_with_holes(file: BinaryIO, header: int) -> bytes:
    """Read a sparse member, whose map of holes tarfile follows."""
    file.seek(header)
    with tarfile.open(fileobj=file, mode="r:", tarinfo=StrictTarInfo) as tar:
        member = tar.next()
        extracted = tar.extractfile(member) if member is not None else None
        if extracted is None:
            raise EOFError("the shard changed after it was first read")
        return extracted.read()
