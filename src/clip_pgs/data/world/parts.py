"""The parts of the demo world's folder, and how each is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from clip_pgs.data.world.draw import draw_scene
from clip_pgs.data.world.hard_negatives import TASKS, HardNegative, hard_negatives
from clip_pgs.data.world.shard_file import Digest, jpeg_bytes, mask_image, png_bytes, write_shard
from clip_pgs.data.world.splits import EVAL_SETS, EvalSet, Sample, captioned, held_out, shown

_SHARD_SIZE = 1000

Tick = Callable[[], None]


@dataclass(frozen=True)
class Part:
    """A folder of the world.

    Args:
        name: Its path in the world's folder.
        about: What it holds, in a few words.
        num_samples: How often it ticks while it is written.
        write: Fills the folder, which exists, and adds the content to a digest.
    """

    name: str
    about: str
    num_samples: int
    write: Callable[[Path, Digest, Tick], None]


def list_parts(seed: int, *, num_train: int, num_val: int, num_per_class: int) -> list[Part]:
    """Return the parts of a world; see `write_world` for the numbers."""
    parts = [
        Part(split, about, count, partial(_write_captioned, split, seed, count))
        for split, about, count in (
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
    items = {task: hard_negatives(task, seed, 3 * num_per_class) for task in TASKS}
    about = f"which of two captions ({len(TASKS)} tasks of {3 * num_per_class})"
    num_items = len(TASKS) * 3 * num_per_class
    parts.append(Part("eval/sugar_crepe", about, num_items, partial(_write_sugar_crepe, items)))
    pictures = list(shown(seed))
    write = partial(_write_scenes, pictures)
    parts.append(Part("scenes", "scenes to look at, with masks", len(pictures), write))
    pictures = list(held_out(seed, 2 * num_per_class))
    write = partial(_write_foreground, pictures)
    about = "scenes with masks, to measure what is kept of objects"
    parts.append(Part("foreground", about, len(pictures), write))
    return parts


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, the same bytes on every system."""
    _write_text(path, json.dumps(content, indent=2) + "\n")


def _write_captioned(
    split: str, seed: int, count: int, folder: Path, digest: Digest, tick: Tick
) -> None:
    sizes = {}
    for number, start in enumerate(range(0, count, _SHARD_SIZE)):
        samples = captioned(split, seed, start, min(start + _SHARD_SIZE, count))
        path = folder / f"{number:05d}.tar"
        sizes[path.name] = write_shard(path, samples, draw=draw_scene, digest=digest, tick=tick)
    write_json(folder / "sizes.json", sizes)


def _write_eval_set(
    eval_set: EvalSet, splits: dict[str, list[Sample]], folder: Path, digest: Digest, tick: Tick
) -> None:
    """Write a set the way clip_benchmark reads `wds/` data sets."""
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
        path = folder / split / "0.tar"
        write_shard(path, samples, draw=eval_set.draw, digest=digest, tick=tick)
        _write_text(folder / split / "nshards.txt", "1\n")


def _write_sugar_crepe(
    items: dict[str, list[HardNegative]], folder: Path, digest: Digest, tick: Tick
) -> None:
    """Write tasks the way clip_benchmark reads `sugar_crepe/` data sets."""
    # The name is that of COCO's validation images, where clip_benchmark looks.
    images = folder / "val2017"
    images.mkdir()
    for task, negatives in items.items():
        entries = {}
        for number, item in enumerate(negatives):
            drawing = draw_scene(item.sample.scene)
            digest.add_sample(item.sample, drawing)
            digest.add_text(item.negative)
            filename = f"{item.sample.key}.jpg"
            (images / filename).write_bytes(jpeg_bytes(drawing))
            entries[str(number)] = {
                "filename": filename,
                "caption": item.sample.caption,
                "negative_caption": item.negative,
            }
            tick()
        write_json(folder / f"{task}.json", entries)


def _write_scenes(samples: Sequence[Sample], folder: Path, digest: Digest, tick: Tick) -> None:
    _write_pictures(samples, folder, folder / "masks", digest, tick)
    _write_text(folder / "captions.txt", "".join(f"{sample.caption}\n" for sample in samples))


def _write_foreground(samples: Sequence[Sample], folder: Path, digest: Digest, tick: Tick) -> None:
    _write_pictures(samples, folder / "images", folder / "masks", digest, tick)


def _write_pictures(
    samples: Sequence[Sample], images: Path, masks: Path, digest: Digest, tick: Tick
) -> None:
    """Write each picture and its mask under one number into two folders."""
    digits = len(str(len(samples) - 1))
    for folder in (images, masks):
        folder.mkdir(exist_ok=True)
    for number, sample in enumerate(samples):
        drawing = draw_scene(sample.scene)
        digest.add_sample(sample, drawing)
        name = f"{number:0{digits}d}.png"
        (images / name).write_bytes(png_bytes(Image.fromarray(drawing.pixels)))
        (masks / name).write_bytes(png_bytes(mask_image(drawing)))
        tick()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
