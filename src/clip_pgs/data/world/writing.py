"""Write the demo world to a folder, once and whole."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clip_pgs.data.captions.word_counting import count_shards
from clip_pgs.data.captions.word_frequencies import write_word_frequencies
from clip_pgs.data.world.parts import list_parts, write_json
from clip_pgs.data.world.shard_file import Digest
from clip_pgs.data.world.vocabulary import WORLD_VERSION

logger = logging.getLogger(__name__)

NUM_TRAIN = 12_000
NUM_VAL = 500
NUM_PER_CLASS = 50

WORDS_NAME = "words.json"

_NAMES = {"train", "val", "eval", "scenes", "foreground", WORDS_NAME, "world.json"}


def write_world(
    root: Path | str,
    *,
    seed: int = 0,
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
    num_per_class: int = NUM_PER_CLASS,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make a folder hold the demo world of a seed.

    The folder gets `train/` and `val/` (webdataset shards with `sizes.json`), `eval/` (the sets of
    `EVAL_SETS` and `sugar_crepe` in clip_benchmark's layouts), `scenes/` (six pictures, masks and
    captions), `foreground/` (pictures and masks), `words.json` (word counts of the training
    captions, for `--text-masking frequency`) and `world.json` (version, seed, counts, digest and
    number of samples of each part, every file's size).
    A folder that holds that very world already is left alone, and one that holds another or a
    damaged one is written anew. All of it appears at once: an interrupted run leaves the folder
    as it was. Of two processes that write beside each other one waits for the other.

    Args:
        root: Folder, made if it does not exist.
        seed: Names the world; another seed shares no image with it.
        num_train: Training samples, at least 1. A larger set starts with the smaller one.
        num_val: Validation samples, at least 1.
        num_per_class: Images per class in each split of the classification sets, at least 1. The
            retrieval set has six times as many in all, each of the seven hard-negative sets three
            times, `foreground/` twice.
        progress: Called after every sample with the number done and the number in all.

    Raises:
        ValueError: If a count is below 1, or the folder holds anything but a world.
    """
    # Where the folder is a link, what it leads to is filled.
    root = Path(root).resolve()
    counts = {"num_train": num_train, "num_val": num_val, "num_per_class": num_per_class}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    identity = {"version": WORLD_VERSION, "seed": seed, **counts}
    if _is_complete(root, identity):
        return
    if root.exists() and (not root.is_dir() or {path.name for path in root.iterdir()} - _NAMES):
        raise ValueError(f"{root} holds something else than a demo world; name another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with _sole_writer(root.parent):
        if not _is_complete(root, identity):
            _write_whole(root, identity, progress)


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; where it or its system has no locks, go on without."""
    descriptor = None
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process, which writes a world in %s", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
    except (ImportError, OSError):
        pass
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _write_whole(
    root: Path, identity: dict[str, int], progress: Callable[[int, int], None] | None
) -> None:
    """Write a world beside its folder, and put it there."""
    partial = root.with_name(root.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    parts = _write_parts(partial, identity, progress)
    captions = count_shards([str(shard) for shard in sorted((partial / "train").glob("*.tar"))])
    write_word_frequencies(captions.frequencies(min_count=1), partial / WORDS_NAME)
    files = {
        path.relative_to(partial).as_posix(): path.stat().st_size
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    write_json(partial / "world.json", {**identity, "parts": parts, "files": files})
    if root.exists():
        logger.info("%s holds another or an incomplete demo world, which is replaced", root)
        shutil.rmtree(root)
    partial.rename(root)


def describe_world(root: Path | str) -> str:
    """Return a table of what a world holds: a line per part with its number of samples."""
    parts = json.loads((Path(root) / "world.json").read_text(encoding="utf-8"))["parts"]
    width = max(map(len, parts))
    return "".join(
        f"{name:<{width}}  {part['num_samples']:>6}  {part['about']}\n"
        for name, part in parts.items()
    )


def _is_complete(root: Path, identity: dict[str, int]) -> bool:
    """Return whether a folder holds the world of these numbers with every file in full length."""
    try:
        world = json.loads((root / "world.json").read_text(encoding="utf-8"))
        if {name: world[name] for name in identity} != identity:
            return False
        sums = [part["num_samples"] + len(part["about"]) for part in world["parts"].values()]
        is_whole = [(root / name).stat().st_size == size for name, size in world["files"].items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        # Whatever else may stand there, it is no world of ours.
        return False
    return bool(sums and is_whole) and all(is_whole)


def _write_parts(
    root: Path, identity: dict[str, int], progress: Callable[[int, int], None] | None
) -> dict[str, dict[str, Any]]:
    """Write all but `world.json` and return what it says of each part."""
    parts = list_parts(
        identity["seed"],
        num_train=identity["num_train"],
        num_val=identity["num_val"],
        num_per_class=identity["num_per_class"],
    )
    num_done, num_all = 0, sum(part.num_samples for part in parts)

    def tick() -> None:
        nonlocal num_done
        num_done += 1
        if progress is not None:
            progress(num_done, num_all)

    facts = {}
    for part in parts:
        (root / part.name).mkdir(parents=True)
        digest = Digest()
        part.write(root / part.name, digest, tick)
        facts[part.name] = {
            "about": part.about,
            "num_samples": part.num_samples,
            "digest": digest.hexdigest(),
        }
    return facts
