"""Write the demo world to a folder, once and whole."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
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
    as it was.

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
    root = Path(root)
    counts = {"num_train": num_train, "num_val": num_val, "num_per_class": num_per_class}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be at least 1, got {count}")
    identity = {"version": WORLD_VERSION, "seed": seed, **counts}
    if _is_complete(root, identity):
        return
    if root.exists() and (not root.is_dir() or {path.name for path in root.iterdir()} - _NAMES):
        raise ValueError(f"{root} holds something else than a demo world; name another folder")

    partial = root.with_name(root.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
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
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return False
    if {name: world.get(name) for name in identity} != identity:
        return False
    paths = {root / name: size for name, size in world["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


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
