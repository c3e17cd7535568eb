"""Which shards a pattern names, how many samples they hold, and how one is written."""

from __future__ import annotations

import glob
import io
import logging
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from itertools import islice
from pathlib import Path

from clip_pgs.common import explained
from clip_pgs.files import MAX_RUN_FILE_BYTES, absence, list_folder, read_file, read_json_object

logger = logging.getLogger(__name__)

MAX_SHARDS = 2**18
# Samples that a file beside the shards may state: more than any data set has.
_MAX_COUNT = 2**40
_MAX_DOUBTFUL = 10**6  # of one shard, that are believed whatever its size
_BLOCK = 512  # bytes of a tar archive, of which each sample takes at least one
_MAX_BRACES = 20
_MAX_DIGITS = 15
_MAX_LENGTH_BYTES = 2**10
_NUMBER_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz")
_REMOTE = re.compile(r"pipe:|[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def is_remote(shard: str) -> bool:
    """Return whether a shard is a URL or a command rather than a local file."""
    return _REMOTE.match(shard) is not None


def is_seekable(shard: str) -> bool:
    """Return whether the samples of a shard can be read in any order."""
    return not is_remote(shard) and not shard.lower().endswith(_COMPRESSED_SUFFIXES)


def expand_shards(pattern: str) -> list[str]:
    """Return the shards a pattern names, in its order.

    Args:
        pattern: Files with braces (`{00000..00012}.tar`) or `*`; several sources joined by `::`.
            `pipe:` commands and URLs take braces too and are not looked up.

    Raises:
        ValueError: If a source names no file, a missing file or a folder.
    """
    return [shard for source in expand_sources(pattern) for shard in source]


def expand_sources(pattern: str) -> list[list[str]]:
    """Return the shards of each source of a pattern; see `expand_shards`."""
    return [_expand_source(source) for source in pattern.split("::")]


def shard_pattern(folder: Path, names: list[str]) -> str:
    """Return a pattern that names shards of a folder, whatever the folder is called.

    Args:
        folder: Of local files.
        names: Such as "00000.tar", numbered without a gap.

    Raises:
        ValueError: If the folder's name holds `::`, which parts sources.
    """
    if "::" in str(folder):
        raise ValueError(
            f"{str(folder)!r} holds '::', which parts the sources of --train-data; name another"
        )
    place = re.sub(r"([\\{}])", r"\\\1", str(folder))
    if not folder.is_absolute() and (":" in place or place.startswith("~")):
        place = f"./{place}"
    first, last = names[0].removesuffix(".tar"), names[-1].removesuffix(".tar")
    return f"{place}/{first if first == last else f'{{{first}..{last}}}'}.tar"


def folder_of_shards(folder: Path) -> str:
    """Say what to write in place of a folder that holds shards; "" of one that holds none."""
    if not any(folder.glob("*.tar")):
        return ""
    pattern = shard_pattern(folder, ["*.tar"])
    return f"{str(folder)!r} is a folder; for the shards in it write {pattern!r}"


def count_earlier(shards: list[str]) -> list[int]:
    """Return how often each shard stands before in a list, as one whose source is named twice."""
    seen: Counter[str] = Counter()
    counts = []
    for shard in shards:
        name = shard if is_remote(shard) else os.path.abspath(shard)
        counts.append(seen[name])
        seen[name] += 1
    return counts


def upsampling_weights(pattern: str, factors: str) -> list[float]:
    """Return the drawing weight of each shard of a pattern.

    Args:
        pattern: Sources joined by `::`.
        factors: One number per source, joined by `::`; every shard of a source gets its number.

    Raises:
        ValueError: If the counts differ, or a factor is no finite number >= 0, or all are 0.
    """
    sources = expand_sources(pattern)
    try:
        weights = [float(factor) for factor in factors.split("::")]
    except ValueError:
        weights = []
    is_right = all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0
    if not is_right or len(weights) != len(sources):
        raise ValueError(
            "--train-data-upsampling-factors takes a finite number >= 0 for each of the "
            f"{len(sources)} data sources, joined by '::', not all of them 0, got {factors!r}"
        )
    return [weight for weight, shards in zip(weights, sources, strict=True) for _ in shards]


def count_samples(shards: list[str]) -> int | None:
    """Return the number of samples that the files beside the shards state.

    Each folder has either `sizes.json` (samples by shard name) or `__len__` (samples of the
    whole folder, as OpenCLIP reads it).

    Args:
        shards: Expanded shards; see `expand_shards`.

    Returns:
        The sum, or None if it is not stated for every shard.

    Raises:
        ValueError: If such a file is there but cannot be understood.
    """
    if any(is_remote(shard) for shard in shards):
        return None
    stated = stated_sizes(shards)
    total = sum(stated.get(shard, 0) for shard in shards)
    unknown = {Path(shard).parent: shard for shard in shards if shard not in stated}
    for folder, shard in unknown.items():
        if (folder / "sizes.json").is_file():
            logger.warning("%s has no entry for %s", folder / "sizes.json", Path(shard).name)
            return None
        if not (folder / "__len__").is_file():
            return None
        total += _read_length(folder / "__len__")
    return total


def cached_index(shard: Path) -> Path:
    """Return where the index of a shard, which reading it makes, is kept if it can be there."""
    return shard.with_name(f".{shard.name}.index")


def stated_sizes(shards: list[str]) -> dict[str, int]:
    """Return what the `sizes.json` in their folders state of local shards.

    Args:
        shards: Expanded local shards.

    Raises:
        ValueError: If a `sizes.json` cannot be understood, or states more samples than a shard can
            hold.
    """
    folders: dict[Path, dict[str, int]] = {}
    stated = {}
    for shard in shards:
        path = Path(shard)
        file = path.parent / "sizes.json"
        if path.parent not in folders:
            folders[path.parent] = read_sizes(file) if file.is_file() else {}
        number = folders[path.parent].get(path.name)
        if number is not None:
            stated[shard] = number
            # A shard that was cut short keeps its number, so that no other sample moves.
            if number > _MAX_DOUBTFUL and number > (size := path.stat().st_size) // _BLOCK:
                raise ValueError(
                    f"{file} says that {path.name} has {number} samples, more than its {size} "
                    "bytes can hold; mend it or remove it"
                )
    return stated


def read_sizes(path: Path) -> dict[str, int]:
    """Read a `sizes.json`.

    Args:
        path: A JSON object that gives the number of samples by shard name.

    Raises:
        ValueError: If it is anything else.
    """
    with explained(f"{path} must map shard names to sample counts", Exception):
        sizes = read_json_object(path, what="it", max_bytes=MAX_RUN_FILE_BYTES)
        return {str(name): _count(size) for name, size in sizes.items()}


def _read_length(path: Path) -> int:
    with explained(f"{path} must hold one whole number", Exception):
        data = read_file(path, what="it", max_bytes=_MAX_LENGTH_BYTES)
        return _count(data.decode("utf-8-sig").strip())


def _count(value: object) -> int:
    if isinstance(value, (int, str)) and not isinstance(value, bool):
        number = int(value)
        if 0 <= number <= _MAX_COUNT:
            return number
    raise ValueError(f"{value!r:.50} is no count")


def _expand_braces(source: str) -> list[str]:
    # An evaluation reads shards without it.
    from braceexpand import braceexpand

    # A range is a list before the first of its numbers comes out.
    is_too_long = any(
        max(len(first), len(last)) > _MAX_DIGITS or abs(int(last) - int(first)) >= MAX_SHARDS
        for first, last in _NUMBER_RANGE.findall(source)
    )
    candidates: list[str] = []
    with suppress(ValueError):
        if not is_too_long and source.count("{") <= _MAX_BRACES:
            candidates = list(islice(braceexpand(source), MAX_SHARDS + 1))
    if not 0 < len(candidates) <= MAX_SHARDS:
        raise ValueError(
            f"shard pattern {source!r} names more than {MAX_SHARDS} files, or has more than "
            f"{_MAX_BRACES} braces, or unbalanced ones; one of a name is \\{{ or \\}}"
        )
    return candidates


def _as_local(path: str) -> str:
    """Return the path of a file in a form that no name of a file can turn into a command."""
    return f"./{path}" if is_remote(path) else path


def _expand_source(source: str) -> list[str]:
    if not source.strip():
        raise ValueError("a shard pattern is empty; name .tar files, for example 'data/{0..7}.tar'")
    candidates = _expand_braces(source)

    shards: list[str] = []
    missing: list[str] = []
    for candidate in candidates:
        if is_remote(candidate) and not candidate.startswith("file:"):
            shards.append(candidate)
            continue
        path = re.sub(r"^file:(//)?", "", candidate)
        if os.path.isdir(path):
            raise ValueError(
                folder_of_shards(Path(path))
                or f"{path!r} is a folder; name the shards in it, for example '*.tar'"
            )
        if os.path.isfile(path):
            shards.append(_as_local(path))
        elif "*" in path or "?" in path:
            # Brackets are part of a name.
            found = sorted(filter(os.path.isfile, glob.glob(path.replace("[", "[[]"))))
            shards.extend(map(_as_local, found))
        else:
            missing.append(path)
    # What is there and no file, a device or a pipe, first.
    missing.sort(key=os.path.exists, reverse=True)
    if not shards and not any(map(os.path.exists, missing[:1])):
        # A folder that may not be read looks as if it held nothing.
        list_folder(Path(path).parent)
        raise ValueError(f"shard pattern {source!r} matches no file")
    if missing:
        raise ValueError(
            f"shard pattern {source!r} names {missing[0]!r}, which {absence(missing[0])} "
            f"({len(missing)} of {len(candidates)} are missing)"
        )
    return shards


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write samples, key and members by suffix, as a shard; the same samples give the same bytes.

    Args:
        path: The new file.
        samples: Names up to 90 characters.
    """
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for key, members in samples:
            for suffix, data in members.items():
                # A fresh TarInfo has time, owner and mode of nobody, so that bytes repeat.
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
