"""Samples of an evaluation set: pictures with their labels or captions, read as data alone.

A set is made of strangers' files. Of a shard's members, pictures are decoded, a label is a number
(or a plain array of 0 and 1) and captions are lines of text; all others are passed over, and
nothing is unpickled or run. What does not fit is refused with the sample and the shard.

Order and batches are those of clip_benchmark's loading with webdataset: worker W of N reads the
shards W, W + N, ..., one after the other, in batches of its own.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from tqdm import tqdm

from clip_pgs.common import explained, is_first_process, one_sentence
from clip_pgs.data.archive import regular_members, stream_tar
from clip_pgs.data.decoding import MAX_IMAGE_BYTES, check_resized, open_image, to_rgb
from clip_pgs.data.loader import hear_parent_alone
from clip_pgs.evaluation.datasets import (
    CLASS_NAMES,
    DamagedDataError,
    ServerError,
    declared_type,
    is_remote,
    list_shards,
    open_file,
    read_class_names,
)
from clip_pgs.files import regular_file

PICTURE_SUFFIXES = ("webp", "png", "jpg", "jpeg")
# Errors that are sentences; the last is that of a shard which its server does not have.
_TOLD = (DamagedDataError, ServerError, FileNotFoundError)
_TARGET_SUFFIXES = {"classification": "cls", "multilabel": "npy", "retrieval": "txt"}
_LABEL = re.compile(rb"\s*([0-9]{1,9})\s*")
_MAX_TARGET_BYTES = {"npy": 2**20, "cls": 2**16, "txt": 2**16}
# Sets have 1 to 10 captions for a picture, in many languages 100. Each takes kB as a feature.
_MAX_CAPTIONS = 200


@dataclass(frozen=True)
class Reading:
    """How pictures are read.

    Attributes:
        transform: From an RGB picture to the model's input, shape (C, H, W).
        batch_size: Pictures per batch, >= 1.
        workers: Processes that read, >= 0; no more than there are shards are used, and none where
            processes cannot be forked.
    """

    transform: Callable[[Any], Tensor]
    batch_size: int = 64
    workers: int = 0


def open_samples(
    location: str, split: str, reading: Reading, *, num_shards: int, title: str
) -> Iterator[tuple[Tensor, Any, list[tuple[int, int]]]]:
    """Yield batches of a split in clip_benchmark's webdataset layout.

    Args:
        location: Folder or URL of the set.
        split: "test" or "train".
        reading: How it is read.
        num_shards: From `count_shards`.
        title: What the progress bar is called.

    Yields:
        Pictures, shape (B, C, H, W), and their classes, shape (B,), int64; which classes they
        show, shape (B, C); or a list of captions for each. And the place of each: the number of
        its shard, and its own in there.

    Raises:
        DamagedDataError: If a shard or a sample is not as it should be.
    """
    suffix = _TARGET_SUFFIXES[declared_type(location) or "classification"]
    names = read_class_names(location)
    num_classes = None if names is None else len(names)
    shards = _Shards(location, split, reading, num_shards, suffix, num_classes)
    total = _estimate_samples(location, split) if sys.stderr.isatty() else None
    is_empty = True
    for batch in _load(shards, min(reading.workers, num_shards), title, total):
        is_empty = False
        yield batch
    if is_empty:
        raise DamagedDataError(
            f"{location}/{split} has no sample with a picture ({', '.join(PICTURE_SUFFIXES)}) and "
            f"a .{suffix} file beside it; a sample's name ends at its first dot"
        )


def open_pictures(paths: Sequence[Path], reading: Reading, *, title: str) -> Iterator[Tensor]:
    """Yield batches of picture files in their order, shape (B, C, H, W).

    Args:
        paths: The files.
        reading: How they are read.
        title: What the progress bar is called.

    Raises:
        DamagedDataError: If a picture cannot be decoded.
    """
    return _load(_Pictures(paths, reading), reading.workers, title, len(paths))


@dataclass(eq=False)
class _Shards(IterableDataset):
    """Batches of a split, or the error that ended them.

    A worker yields its error: torch would put a traceback in front of the sentence.
    """

    location: str
    split: str
    reading: Reading
    num_shards: int
    target_suffix: str
    num_classes: int | None

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        numbers = range(first, self.num_shards, step)
        samples = itertools.chain.from_iterable(map(self._read_shard, numbers))
        try:
            while batch := list(itertools.islice(samples, self.reading.batch_size)):
                pictures, targets, places = map(list, zip(*batch, strict=True))
                is_text = self.target_suffix == "txt"
                yield _stack(pictures), targets if is_text else _stack(targets), places
        except _TOLD as error:
            yield error

    def _read_shard(self, number: int) -> Iterator[tuple[Tensor, Any, tuple[int, int]]]:
        shard = f"{self.split}/{number}.tar"
        wanted = {*PICTURE_SUFFIXES, self.target_suffix}
        members = _read_members(self.location, shard, wanted)
        samples = itertools.groupby(members, key=lambda member: member[0])
        for place, (key, group) in enumerate(samples):
            files: dict[str, bytes] = {}
            others: list[str] = []
            found: list[str] = []
            for _, suffix, content in group:
                if "." in suffix:
                    others.append(suffix)
                    continue
                if suffix in files:
                    _refuse(key, shard, f"has two .{suffix} files")
                files[suffix] = content
                found = [suffix for suffix in files if suffix in PICTURE_SUFFIXES]
                if len(found) > 1:
                    endings = " and a .".join(found)
                    _refuse(key, shard, f"must have one picture, got a .{endings} file")
            if others and (not found or self.target_suffix not in files or _has_pair(others)):
                names = ", ".join(f"{key}.{suffix}" for suffix in others[:4])
                _refuse(
                    key, shard, f"has files with more dots, and a name ends at its first: {names}"
                )
            if not found:
                _refuse(key, shard, f"has a .{self.target_suffix} file but no picture beside it")
            if self.target_suffix not in files:
                _refuse(key, shard, f"has a picture but no .{self.target_suffix} file beside it")
            try:
                target = self._read_target(files[self.target_suffix])
            # What is in the file can be anything.
            except Exception as error:
                _refuse(key, shard, f"has no usable .{self.target_suffix}: {one_sentence(error)}")
            pixels_CHW = _decode(files[found[0]], self.reading, f"{key!r} of {shard}")
            yield pixels_CHW, target, (number, place)

    def _read_target(self, content: bytes) -> Any:
        if self.target_suffix == "txt":
            captions = content.decode("utf-8-sig").splitlines()
            if not any(map(str.strip, captions)):
                raise ValueError("there is no caption")
            if len(captions) > _MAX_CAPTIONS:
                raise ValueError(
                    f"a picture has at most {_MAX_CAPTIONS} captions, a line each, got "
                    f"{len(captions)}"
                )
            return captions
        if self.target_suffix == "npy":
            shown = torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
            length = self.num_classes or shown.numel()
            if shown.shape != (length,) or not ((shown == 0) | (shown == 1)).all():
                raise ValueError(f"it must hold a 0 or 1 for each of {length} classes")
            return shown
        match = _LABEL.fullmatch(content)
        if match is None:
            raise ValueError(f"a label is the number of a class, got {content[:40]!r}")
        label = int(match[1])
        if self.num_classes is not None and label >= self.num_classes:
            raise ValueError(
                f"a label must be one of the {self.num_classes} classes of {CLASS_NAMES}, from 0, "
                f"got {label}"
            )
        return torch.tensor(label)


@dataclass(eq=False)
class _Pictures(Dataset):
    """Batches of picture files, or the error in place of one."""

    paths: Sequence[Path]
    reading: Reading

    def __len__(self) -> int:
        return math.ceil(len(self.paths) / self.reading.batch_size)

    def __getitem__(self, number: int) -> Tensor | DamagedDataError:
        start = number * self.reading.batch_size
        paths = self.paths[start : start + self.reading.batch_size]
        try:
            return _stack([_decode(path, self.reading, str(path)) for path in paths])
        except DamagedDataError as error:
            return error


def _decode(content: bytes | Path, reading: Reading, what: str) -> Tensor:
    # Pictures of odd sizes make a transform raise anything.
    with explained(f"the picture {what} cannot be decoded", Exception, as_kind=DamagedDataError):
        image = open_image(content)
        check_resized(image, reading.transform)
        return reading.transform(to_rgb(image))


def _stack(tensors: list[Tensor]) -> Tensor:
    """Put the pictures or labels of a batch together, or tell why they do not fit together."""
    with explained("samples of a batch differ", RuntimeError, TypeError, as_kind=DamagedDataError):
        return torch.stack(tensors)


def _refuse(key: str, shard: str, reason: str) -> NoReturn:
    raise DamagedDataError(f"sample {key!r} of {shard} {reason}")


def _has_pair(suffixes: Iterable[str]) -> bool:
    """Return whether a picture and a label differ by their last suffix alone."""
    stems: tuple[set[str], set[str]] = (set(), set())
    for suffix in suffixes:
        stem, _, ending = suffix.rpartition(".")
        stems[ending in PICTURE_SUFFIXES].add(stem)
    return not stems[0].isdisjoint(stems[1])


def _read_members(
    location: str, shard: str, suffixes: set[str]
) -> Iterator[tuple[str, str, bytes]]:
    """Yield (sample, suffix, content) of the files with such suffixes, in their order.

    Of files with such a suffix behind another, as `seg.png` or those of a name with a dot, the
    content is left out.
    """
    try:
        with (
            open_file(location, shard) as file,
            stream_tar(file) as tar,
        ):
            for key, suffix, member in regular_members(tar):
                ending = suffix.rpartition(".")[2]
                if ending not in suffixes:
                    continue
                if ending != suffix:
                    yield key, suffix, b""
                    continue
                limit = _MAX_TARGET_BYTES.get(suffix, MAX_IMAGE_BYTES)
                if member.size > limit:
                    rule = f"must have a .{suffix} file of at most {limit} bytes"
                    _refuse(key, shard, f"{rule}, got {member.size}")
                if member.issparse():
                    _refuse(key, shard, f"has a .{suffix} file with holes")
                content = tar.extractfile(member)
                assert content is not None
                yield key, suffix, content.read()
    except _TOLD:
        raise
    # A damaged archive makes tarfile and the decompressors raise anything.
    except Exception as error:
        raise DamagedDataError(
            f"{location}/{shard} cannot be read: it is damaged or no tar archive "
            f"({type(error).__name__}: {one_sentence(error)})"
        ) from error


def _load(dataset: Dataset, workers: int, title: str, total: int | None) -> Iterator[Any]:
    """Yield batches, with a bar on the terminal of rank 0, and raise what a worker yields."""
    workers = workers if sys.platform == "linux" else 0
    context = "fork" if workers else None
    with tqdm(
        desc=title,
        total=total,
        unit=" images",
        file=sys.stderr,
        leave=False,
        # The bars of several processes would write over each other.
        disable=not (sys.stderr.isatty() and is_first_process()),
    ) as bar:
        for parts in DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            collate_fn=_to_hand_over,
            multiprocessing_context=context,
            worker_init_fn=hear_parent_alone,
        ):
            if isinstance(parts, _TOLD):
                raise parts
            batch = [torch.from_numpy(p) if isinstance(p, np.ndarray) else p for p in parts]
            yield batch[0] if len(batch) == 1 else tuple(batch)
            bar.update(len(batch[0]))


def _to_hand_over(batch: Any) -> Any:
    """Take a batch apart for the main process; runs in the worker."""
    if isinstance(batch, _TOLD):
        return batch
    return [_shared(part) for part in ([batch] if isinstance(batch, Tensor) else batch)]


def _shared(part: Any) -> Any:
    """Put a worker's tensor into /dev/shm, or, where that is full, into an array.

    An array goes through a pipe. torch would lose the tensor, and wait for it for ever.
    """
    if isinstance(part, Tensor) and get_worker_info() is not None:
        try:
            part.share_memory_()
        except RuntimeError:
            return part.numpy()
    return part


def _estimate_samples(location: str, split: str) -> int | None:
    """Say about how many samples a split has, from the first shard's and the sizes of all."""
    if is_remote(location):
        return None
    try:
        shards = list_shards(location, split)
        with regular_file(shards[0]).open("rb") as file, stream_tar(file) as tar:
            names = {key for key, _, _ in regular_members(tar)}
        total_bytes = sum(shard.stat().st_size for shard in shards)
        return round(len(names) * total_bytes / shards[0].stat().st_size)
    # What is wrong with a shard is said when it is read.
    except Exception:
        return None
