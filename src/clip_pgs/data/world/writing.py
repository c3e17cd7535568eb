"""Write the demo world to a folder, once and whole."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from clip_pgs.data.world.draw import draw_scene
from clip_pgs.data.world.shard_file import Digest, mask_image, png_bytes, write_shard
from clip_pgs.data.world.splits import EVAL_SETS, EvalSet, Sample, captioned, shown
from clip_pgs.data.world.vocabulary import WORLD_VERSION

logger = logging.getLogger(__name__)

NUM_TRAIN = 12_000
NUM_VAL = 500
NUM_PER_CLASS = 50

_SHARD_SIZE = 1000
_PARTS = {"train", "val", "eval", "scenes", "world.json"}


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

    The folder gets `train/` and `val/` (webdataset shards with `sizes.json`), `eval/` (shape,
    color and retrieval in clip_benchmark's layout), `scenes/` (six pictures, masks and captions)
    and `world.json` (version, seed, counts, digest of the content, every file's size).
    A folder that holds that very world already is left alone, and one that holds another or a
    damaged one is written anew. All of it appears at once: an interrupted run leaves the folder
    as it was.

    Args:
        root: Folder, made if it does not exist.
        seed: Names the world; another seed shares no image with it.
        num_train: Training samples, at least 1. A larger set starts with the smaller one.
        num_val: Validation samples, at least 1.
        num_per_class: Images per class in each split of the classification sets, at least 1; the
            retrieval set has six times as many.
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
    if root.exists() and (not root.is_dir() or {path.name for path in root.iterdir()} - _PARTS):
        raise ValueError(f"{root} holds something else than a demo world; name another folder")

    partial = root.with_name(root.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    digest = _write_parts(partial, identity, progress)
    files = {
        path.relative_to(partial).as_posix(): path.stat().st_size
        for path in sorted(partial.rglob("*"))
        if path.is_file()
    }
    _write_json(partial / "world.json", {**identity, "digest": digest, "files": files})
    if root.exists():
        logger.info("%s holds another or an incomplete demo world, which is replaced", root)
        shutil.rmtree(root)
    partial.rename(root)


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
) -> str:
    """Write all but `world.json` and return the digest of the content."""
    seed, num_per_class = identity["seed"], identity["num_per_class"]
    captioned_counts = {"train": identity["num_train"], "val": identity["num_val"]}
    eval_samples = {
        name: {split: make(seed, num_per_class) for split, make in eval_set.splits.items()}
        for name, eval_set in EVAL_SETS.items()
    }
    num_done, num_all = 0, sum(captioned_counts.values())
    num_all += sum(len(samples) for splits in eval_samples.values() for samples in splits.values())
    digest = Digest()

    def tick() -> None:
        nonlocal num_done
        num_done += 1
        if progress is not None:
            progress(num_done, num_all)

    for split, count in captioned_counts.items():
        folder = root / split
        folder.mkdir()
        sizes = {}
        for number, start in enumerate(range(0, count, _SHARD_SIZE)):
            samples = captioned(split, seed, start, min(start + _SHARD_SIZE, count))
            path = folder / f"{number:05d}.tar"
            sizes[path.name] = write_shard(path, samples, digest=digest, tick=tick)
        _write_json(folder / "sizes.json", sizes)
    for name, eval_set in EVAL_SETS.items():
        _write_eval_set(root / "eval" / name, eval_set, eval_samples[name], digest, tick)
    _write_scenes(root / "scenes", shown(seed), digest)
    return digest.hexdigest()


def _write_eval_set(
    folder: Path,
    eval_set: EvalSet,
    splits: dict[str, list[Sample]],
    digest: Digest,
    tick: Callable[[], None],
) -> None:
    """Write a set the way clip_benchmark reads `wds/` data sets."""
    folder.mkdir(parents=True)
    texts = {"dataset_type.txt": [eval_set.task]}
    if eval_set.class_names is not None:
        texts["classnames.txt"] = list(eval_set.class_names)
    if eval_set.templates is not None:
        texts["zeroshot_classification_templates.txt"] = list(eval_set.templates)
    for name, lines in texts.items():
        _write_text(folder / name, "".join(f"{line}\n" for line in lines))
        digest.add_text("\n".join(lines))
    for split, samples in splits.items():
        (folder / split).mkdir()
        write_shard(folder / split / "0.tar", samples, digest=digest, tick=tick)
        _write_text(folder / split / "nshards.txt", "1\n")


def _write_scenes(folder: Path, samples: Iterator[Sample], digest: Digest) -> None:
    (folder / "masks").mkdir(parents=True)
    captions = []
    for number, sample in enumerate(samples):
        drawing = draw_scene(sample.scene)
        digest.add_sample(sample, drawing)
        (folder / f"{number}.png").write_bytes(png_bytes(Image.fromarray(drawing.pixels)))
        (folder / "masks" / f"{number}.png").write_bytes(png_bytes(mask_image(drawing)))
        captions.append(f"{sample.caption}\n")
    _write_text(folder / "captions.txt", "".join(captions))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
