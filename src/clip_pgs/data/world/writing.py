"""Write the demo world to a folder, once and whole."""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from clip_pgs.data.commands import map_in, worker_processes
from clip_pgs.data.shards import cached_index, write_shard
from clip_pgs.data.world.captions import TASKS, hard_negatives
from clip_pgs.data.world.draw import Drawing, draw_scene
from clip_pgs.data.world.scene import WORLD_VERSION, Sample, Scene
from clip_pgs.data.world.splits import EVAL_SETS, EvalSet, captioned, held_out, shown
from clip_pgs.files import (
    MAX_RUN_FILE_BYTES,
    atomic_folder,
    check_room,
    folder_lock,
    read_json_object,
    unfinished_path,
    write_json,
)

logger = logging.getLogger(__name__)

NUM_TRAIN = 12_000
NUM_VAL = 500
NUM_PER_CLASS = 50

WORDS_NAME = "words.json"

_WORLD_NAME = "world.json"
_SHARD_SIZE = 1000
# Full color resolution: chroma of half the size would wash out a small object.
_JPEG = {"format": "JPEG", "quality": 92, "subsampling": 0}
_PNG = {"format": "PNG"}
# At least, on the disk: of a training sample, and of any.
_CAPTIONED_BYTES, _SAMPLE_BYTES = 6_500, 3_000
# Samples that a process draws before it hands them over.
_CHUNK = 32

# Gets the number of samples done and of all.
Progress = Callable[[int, int], None]
# As `map` does, in order; that of an executor in several processes.
Map = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


def write_world(
    root: Path | str,
    *,
    seed: int = 0,
    num_train: int = NUM_TRAIN,
    num_val: int = NUM_VAL,
    num_per_class: int = NUM_PER_CLASS,
    num_workers: int = 1,
    progress: Progress | None = None,
) -> None:
    """Make a folder hold the demo world of a seed.

    The folder gets `train/` and `val/` (webdataset shards with `sizes.json`), `eval/` (the sets of
    `EVAL_SETS` and `sugar_crepe` in clip_benchmark's layouts), `scenes/` (six pictures, masks and
    captions), `foreground/` (pictures and masks), `words.json` (word counts of the training
    captions, for `--text-masking frequency`) and `world.json` (version, seed, counts, digest and
    number of samples of each part, every file's size).
    A folder that holds that very world already is left alone, and one that holds another or a
    damaged one is written anew, unless it holds a file besides that its `world.json` does not name.
    All of it appears at once: an interrupted run leaves the folder as it was. Of two processes that
    write beside each other one waits for the other.

    Args:
        root: Folder, made if it does not exist.
        seed: Names the world; another seed shares no image with it.
        num_train: Training samples, at least 1. A larger set starts with the smaller one.
        num_val: Validation samples, at least 1.
        num_per_class: Images per class in each split of the classification sets, at least 1. The
            retrieval set has six times as many in all, each of the seven hard-negative sets three
            times, `foreground/` twice.
        num_workers: Processes that draw, at least 1; the world does not depend on them.
        progress: Called after every sample with the number done and the number in all.

    Raises:
        ValueError: If a count is below 1, the folder has to be written and holds anything but a
            world, or the disk has no room for it.
        LostProcessError: If one of the processes is killed; the folder is as it was.
    """
    # Where the folder is a link, what it leads to is filled.
    root = Path(root).resolve()
    counts = {"num_train": num_train, "num_val": num_val, "num_per_class": num_per_class}
    for name, number in {**counts, "num_workers": num_workers}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    identity = {"version": WORLD_VERSION, "seed": seed, **counts}
    if _is_complete(root, identity):
        return
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is no folder")
    # Of a class there are as many samples as in all parts of the smallest world.
    smallest = list_parts(seed, num_train=1, num_val=1, num_per_class=1)
    per_class = sum(part.num_samples for part in smallest)
    least = _CAPTIONED_BYTES * (num_train + num_val) + _SAMPLE_BYTES * per_class * num_per_class
    check_room(root, least)
    root.parent.mkdir(parents=True, exist_ok=True)
    waiting = f"waiting for another process, which writes a world in {root.parent}"
    with folder_lock(root.parent, on_busy=lambda: logger.info(waiting)):
        if not _is_complete(root, identity):
            if (other := _other_file(root)) is not None:
                raise ValueError(
                    f"{root} holds something else than a demo world, {other}, which would be lost "
                    "when the world is written; move it, or name another folder"
                )
            _write_whole(root, identity, list_parts(seed, **counts), num_workers, progress)


def describe_world(root: Path | str) -> str:
    """Return a table of what a world holds: a line per part with its number of samples."""
    parts = json.loads((Path(root) / _WORLD_NAME).read_text(encoding="utf-8"))["parts"]
    width = max(map(len, parts))
    return "".join(
        f"{name:<{width}}  {part['num_samples']:>6}  {part['about']}\n"
        for name, part in parts.items()
    )


def _is_complete(root: Path, identity: dict[str, int]) -> bool:
    """Return whether a folder holds the world of these numbers with every file in full length."""
    try:
        world = _read_world(root)
        if {name: world[name] for name in identity} != identity:
            return False
        sums = [part["num_samples"] + len(part["about"]) for part in world["parts"].values()]
        is_whole = [(root / name).stat().st_size == size for name, size in world["files"].items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        # Whatever else may stand there, it is no world of ours.
        return False
    return bool(sums and is_whole) and all(is_whole)


def _other_file(root: Path) -> str | None:
    """Return a file of a folder that is none of the world there, None where there is none."""
    names = {_WORLD_NAME}
    with suppress(OSError, ValueError, LookupError, TypeError):
        names |= {*_read_world(root)["files"]}
        indexes = [cached_index(Path(name)) for name in names]
        names |= {path.as_posix() for each in indexes for path in (each, unfinished_path(each))}
    found = (path for path in sorted(root.rglob("*")) if path.is_symlink() or not path.is_dir())
    others = (path.relative_to(root).as_posix() for path in found)
    return next((name for name in others if name not in names), None)


def _read_world(root: Path) -> dict[str, Any]:
    return read_json_object(root / _WORLD_NAME, what="it", max_bytes=MAX_RUN_FILE_BYTES)


class Record:
    """What has been drawn: its number, and a SHA-256 over texts, pixels and masks.

    File bytes can change with the release of the image library; the digest cannot.

    Args:
        tick: Called after every sample.
    """

    def __init__(self, tick: Callable[[], None] = lambda: None) -> None:
        self._hash = hashlib.sha256()
        self._tick = tick

    def add_text(self, text: str) -> None:
        """Add a text."""
        self._hash.update(f"{len(text)}:{text}".encode())

    def add_sample(self, sample: Sample, drawing: Drawing) -> None:
        """Add a sample's key, caption, label, pixels and mask."""
        self.add_text(f"{sample.key}|{sample.caption}|{sample.label}")
        self._hash.update(drawing.pixels.tobytes())
        self._hash.update(np.packbits(drawing.foreground).tobytes())
        self._tick()

    def digest(self) -> str:
        """Return the digest of all that was added."""
        return self._hash.hexdigest()


class Part(NamedTuple):
    """A folder of the world.

    Args:
        name: Its path in the world's folder.
        about: What it holds, in a few words.
        num_samples: How many samples it adds to a record.
        write: Fills the folder, which exists, and adds the content to a record; draws by `map`.
    """

    name: str
    about: str
    num_samples: int
    write: Callable[[Path, Record, Map], None]


def list_parts(seed: int, *, num_train: int, num_val: int, num_per_class: int) -> list[Part]:
    """Return the parts of a world; see `write_world` for the numbers."""
    parts = [
        Part(split, about, number, partial(_write_captioned, split, seed, number))
        for split, about, number in (
            ("train", "captioned scenes to train on", num_train),
            ("val", "captioned scenes to watch training with", num_val),
        )
    ]
    for name, eval_set in EVAL_SETS.items():
        splits = {split: make(seed, num_per_class) for split, make in eval_set.splits.items()}
        counts = {split: len(samples) for split, samples in splits.items()}
        about = f"{eval_set.about} ({', '.join(f'{split} {n}' for split, n in counts.items())})"
        write = partial(_write_eval_set, eval_set, splits)
        parts.append(Part(f"eval/{name}", about, sum(counts.values()), write))
    number = 3 * num_per_class
    about = f"which of two captions ({len(TASKS)} tasks of {number})"
    write = partial(_write_sugar_crepe, seed, number)
    parts.append(Part("eval/sugar_crepe", about, len(TASKS) * number, write))
    scenes, foreground = shown(seed), held_out(seed, 2 * num_per_class)
    write = partial(_write_pictures, scenes, images=".", captions="captions.txt")
    parts.append(Part("scenes", "scenes to look at, with masks", len(scenes), write))
    about = "scenes with masks, to measure what is kept of objects"
    write = partial(_write_pictures, foreground, images="images")
    parts.append(Part("foreground", about, len(foreground), write))
    return parts


def _write_whole(
    root: Path,
    identity: dict[str, int],
    parts: list[Part],
    num_workers: int,
    progress: Progress | None,
) -> None:
    """Write a world beside its folder, and put it there."""
    if root.exists() and any(root.iterdir()):
        logger.info("%s holds another or an incomplete demo world, which is replaced", root)
    facts, num_done, num_all = {}, count(1), sum(part.num_samples for part in parts)
    num_processes = num_workers if num_workers > 1 else 0
    drawing = worker_processes(num_processes, "draw scenes")
    with atomic_folder(root) as folder, drawing as processes:
        each: Map = map if processes is None else partial(map_in, processes, chunk=_CHUNK)
        for part in parts:
            (folder / part.name).mkdir(parents=True)
            record = Record(lambda: progress(next(num_done), num_all) if progress else None)
            part.write(folder / part.name, record, each)
            facts[part.name] = {
                "about": part.about,
                "num_samples": part.num_samples,
                "digest": record.digest(),
            }
            if part.name == "train":
                # Processes begin at once, `map` when it is asked.
                words = each(_write_words, [folder])
        list(words)
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        write_json(folder / _WORLD_NAME, {**identity, "parts": facts, "files": files})


def _write_words(root: Path) -> None:
    # What reads shards imports torch, which takes seconds.
    from clip_pgs.data.words import count_shards, write_word_frequencies

    captions = count_shards([str(path) for path in sorted(root.glob("train/*.tar"))])
    write_word_frequencies(captions.frequencies(min_count=1), root / WORDS_NAME)


def _write_captioned(
    split: str, seed: int, num_all: int, folder: Path, record: Record, each: Map
) -> None:
    sizes = {}
    for number, start in enumerate(range(0, num_all, _SHARD_SIZE)):
        stop = min(start + _SHARD_SIZE, num_all)
        path = folder / f"{number:05d}.tar"
        samples = captioned(split, seed, start, stop)
        write_shard(path, _shard_samples(samples, draw_scene, record, each))
        sizes[path.name] = stop - start
    write_json(folder / "sizes.json", sizes)


def _write_eval_set(
    eval_set: EvalSet, splits: dict[str, list[Sample]], folder: Path, record: Record, each: Map
) -> None:
    """Write a set the way clip_benchmark reads `wds/` data sets."""
    kind = "classification" if eval_set.class_names else "retrieval"
    texts: dict[str, tuple[str, ...]] = {"dataset_type.txt": (kind,)}
    if eval_set.class_names:
        texts["classnames.txt"] = eval_set.class_names
        texts["zeroshot_classification_templates.txt"] = eval_set.templates
    for name, lines in texts.items():
        _write_text(folder / name, "".join(f"{line}\n" for line in lines))
        record.add_text("\n".join(lines))
    for split, samples in splits.items():
        (folder / split).mkdir()
        drawn = _shard_samples(samples, eval_set.draw, record, each)
        write_shard(folder / split / "0.tar", drawn)
        _write_text(folder / split / "nshards.txt", "1\n")


def _write_sugar_crepe(seed: int, number: int, folder: Path, record: Record, each: Map) -> None:
    """Write tasks the way clip_benchmark reads `sugar_crepe/` data sets."""
    # The name is that of COCO's validation images, where clip_benchmark looks.
    images = folder / "val2017"
    images.mkdir()
    for task in TASKS:
        entries = {}
        items = hard_negatives(task, seed, number)
        drawings = each(draw_scene, [sample.scene for sample, _ in items])
        for position, ((sample, negative), drawing) in enumerate(zip(items, drawings, strict=True)):
            record.add_sample(sample, drawing)
            record.add_text(negative)
            filename = f"{sample.key}.jpg"
            (images / filename).write_bytes(_encoded(drawing.pixels, **_JPEG))
            entries[str(position)] = {
                "filename": filename,
                "caption": sample.caption,
                "negative_caption": negative,
            }
        write_json(folder / f"{task}.json", entries)


def _write_pictures(
    samples: Sequence[Sample],
    folder: Path,
    record: Record,
    each: Map,
    *,
    images: str,
    captions: str | None = None,
) -> None:
    """Write each picture and its mask under one number into two folders."""
    digits = len(str(len(samples) - 1))
    for name in (images, "masks"):
        (folder / name).mkdir(exist_ok=True)
    drawings = each(draw_scene, [sample.scene for sample in samples])
    for number, (sample, drawing) in enumerate(zip(samples, drawings, strict=True)):
        record.add_sample(sample, drawing)
        name = f"{number:0{digits}d}.png"
        (folder / images / name).write_bytes(_encoded(drawing.pixels, **_PNG))
        (folder / "masks" / name).write_bytes(_encoded(drawing.foreground, **_PNG))
    if captions is not None:
        _write_text(folder / captions, "".join(f"{sample.caption}\n" for sample in samples))


def _shard_samples(
    samples: Iterable[Sample], draw: Callable[[Scene], Drawing], record: Record, each: Map
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Draw samples for a shard.

    Members of a sample: `cls` (label, where there is one), `jpg`, `json` (the scene), `mask.png`
    (white where objects are) and `txt` (caption).
    """
    for sample, drawing, members in each(partial(_draw_members, draw), samples):
        record.add_sample(sample, drawing)
        yield sample.key, members


def _draw_members(
    draw: Callable[[Scene], Drawing], sample: Sample
) -> tuple[Sample, Drawing, dict[str, bytes]]:
    drawing, scene = draw(sample.scene), sample.scene
    # dataclasses.asdict copies deeply, which takes longer than drawing the background.
    plain = {**vars(scene), "things": [vars(thing) for thing in scene.things]}
    members = {} if sample.label is None else {"cls": str(sample.label).encode()}
    members |= {
        "jpg": _encoded(drawing.pixels, **_JPEG),
        "json": json.dumps(plain).encode(),
        "mask.png": _encoded(drawing.foreground, **_PNG),
        "txt": sample.caption.encode(),
    }
    return sample, drawing, members


def _encoded(pixels: NDArray[Any], **options: Any) -> bytes:
    """Return the file of a picture, or of a mask of one bit, white where it is true."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, **options)
    return file.getvalue()


def _write_text(path: Path, text: str) -> None:
    """Write a text file, the same bytes on every system."""
    path.write_text(text, encoding="utf-8", newline="\n")
