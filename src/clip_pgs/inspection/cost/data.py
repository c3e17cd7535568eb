"""How fast JPEG files become training crops, and whether steps wait for them: the command `data`.

OpenCLIP's own path decodes and crops the same files beside ours, and training's own loader can run
beside steps of a given length.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, sleep
from typing import Any

import open_clip
import torch
from torch import Tensor
from tqdm import tqdm
from webdataset.autodecode import imagehandler

from clip_pgs.common import one_sentence
from clip_pgs.data.bad_samples import Skip, SkipAccount
from clip_pgs.data.batches import Batching, PlannedBatches
from clip_pgs.data.decoding import (
    UnreadableImageError,
    faster_transform,
    open_image,
    read_image_file,
)
from clip_pgs.data.loader import SampleStream
from clip_pgs.data.order import RowPlan, SampleRef
from clip_pgs.data.samples import RawSample, SampleDecoder
from clip_pgs.data.shards import is_seekable
from clip_pgs.data.tar import read_shard
from clip_pgs.files import check_writable, list_folder, regular_file, write_json
from clip_pgs.inspection.cost.step import TICK, Columns, check_effect, measured_table
from clip_pgs.tables import counted

CAPTION = b"a dog runs over the grass with a ball in its mouth"
JPEG_SUFFIXES = (".jpg", ".jpeg")


def read_jpegs(paths: Sequence[str | Path], *, min_side: int = 0, limit: int = 512) -> list[bytes]:
    """Read JPEG files out of folders and tar shards; images of another kind or damaged are left.

    Args:
        paths: Image files, folders of them, or shards, also compressed.
        min_side: Images whose longer side has fewer pixels are left out.
        limit: At most so many are read.

    Raises:
        ValueError: If a path is not there or cannot be read, or no image is left.
    """
    found: list[bytes] = []
    for path in map(Path, paths):
        try:
            for data in _files(path):
                if len(found) == limit:
                    break
                try:
                    image = open_image(data)
                except UnreadableImageError:
                    continue
                if image.format == "JPEG" and max(image.size) >= min_side:
                    found.append(data)
        except OSError as error:
            raise ValueError(f"cannot read {one_sentence(error)}") from None
    if not found:
        size = f" with a side of {min_side} pixels or more" if min_side else ""
        # The shell expands the pattern, so that it stands without quotation marks.
        hints = [
            f"; for the shards in {p} write {p}/*.tar" for p in paths if any(Path(p).glob("*.tar"))
        ]
        raise ValueError(f"there is no JPEG file{size}{hints[0] if hints else ''}")
    return found


def _files(path: Path) -> Iterator[bytes]:
    if path.is_dir():
        files = [p for p in list_folder(path) if p.suffix.lower() in JPEG_SUFFIXES]
        for file in filter(Path.is_file, files):
            yield from _files(file)
    elif path.suffix.lower() == ".tar" or not is_seekable(str(path.absolute())):
        # No name that is absolute is taken for a command or a URL.
        for sample in read_shard(str(regular_file(path).absolute())):
            if isinstance(sample, Skip):
                if not sample.key:
                    raise ValueError(str(sample))
            elif sample.image:
                yield sample.image
    else:
        # One that is too large.
        with suppress(UnreadableImageError):
            yield read_image_file(path)


def our_decoder(image_size: int) -> SampleDecoder:
    """Return what decodes, crops and tokenizes samples in training."""
    transform = open_clip.image_transform(image_size, is_train=True)
    return SampleDecoder(faster_transform(transform), open_clip.get_tokenizer("ViT-B-16"), seed=0)


# One core


def measure_data_speed(
    images: Sequence[bytes], *, image_size: int = 224, num_rounds: int
) -> dict[str, Any]:
    """Time both paths on the same images, in turns, with one thread.

    Both tokenize a caption, and draw crops in the same way; ours are left as bytes, which training
    normalizes on its device. Processor time is measured, which other processes do not lengthen.

    Args:
        images: JPEG files.
        image_size: Side of a crop in pixels.
        num_rounds: Rounds that count; one more comes first.

    Returns:
        `num_images` of a round; images per second of this package's path, `ours`, and of
        OpenCLIP's, `open_clip`, medians over rounds; and `ratio`, of the one over the other, median
        of the rounds' ratios.
    """
    transform = open_clip.image_transform(image_size, is_train=True)
    tokenize = open_clip.get_tokenizer("ViT-B-16")
    decode, decoder = imagehandler("pilrgb"), our_decoder(image_size)

    def run_ours(data: bytes) -> tuple[Tensor, Tensor]:
        return decoder(RawSample("shard", "key", data, (CAPTION,)), epoch=0)

    def run_open_clip(data: bytes) -> tuple[Tensor, Tensor]:
        return transform(decode("jpg", data)), tokenize(CAPTION.decode())[0]

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    ours: list[float] = []
    theirs: list[float] = []
    paths = product(range(num_rounds + 1), ((run_ours, ours), (run_open_clip, theirs)))
    try:
        for _, (run, record) in tqdm(list(paths), leave=False, disable=None):
            started = process_time()
            for data in images:
                run(data)
            record.append(max(process_time() - started, TICK))
    finally:
        torch.set_num_threads(num_threads)
    del ours[0], theirs[0]
    return {
        "num_images": len(images),
        "ours": len(images) / median(ours),
        "open_clip": len(images) / median(theirs),
        "ratio": median(other / own for own, other in zip(ours, theirs, strict=True)),
    }


# Training's loader


class JpegSource:
    """Images in memory, all with one caption.

    Args:
        images: JPEG files.
    """

    def __init__(self, images: Sequence[bytes]) -> None:
        self.images = images

    def read(self, ref: SampleRef) -> RawSample | Skip:
        """Return an image's bytes."""
        return RawSample("memory", str(ref.number), self.images[ref.number], (CAPTION,), ref.repeat)

    def describe(self, shard: int, number: int) -> str:
        """Return the number of an image."""
        return f"image {number}"


def measure_loader_speed(
    images: Sequence[bytes],
    *,
    image_size: int = 224,
    num_workers: int,
    batch_size: int,
    num_batches: int,
    step_seconds: float | None = None,
) -> dict[str, Any]:
    """Time a loader, at first alone and then beside steps of a given length.

    A step is a pause, which leaves the machine's cores to the workers, as a GPU's step does.

    Args:
        images: JPEG files; they come again and again, cropped anew.
        image_size: Side of a crop in pixels.
        num_workers: Loading processes, at least 1.
        batch_size: Images of a batch.
        num_batches: Batches that count; those that workers make in advance come first.
        step_seconds: What a step takes; None leaves the second part out.

    Returns:
        `num_workers`, `batch_size` and `step_seconds` as given; `images_per_second`, by the clock,
        where each batch is asked for as soon as the last one came, and
        `images_per_second_per_worker`; and `waiting_share`, the share of a step's time, waiting
        included, in which it waits for its batch, None without steps.
    """
    # Each worker starts, and makes two batches in advance.
    num_first = 3 * num_workers
    num_samples = (num_first + num_batches) * batch_size
    batches = PlannedBatches(
        JpegSource(images),
        RowPlan(len(images), seed=0),
        our_decoder(image_size),
        Batching(batch_size, per_step=1),
        num_samples=num_samples,
        num_workers=num_workers,
    )
    stream = SampleStream(batches, SkipAccount())

    def waiting(pause: float) -> float:
        """Return how long an epoch's batches were waited for, in seconds."""
        waits = []
        started = perf_counter()
        for _ in tqdm(stream, total=num_first + num_batches, leave=False, disable=None):
            waits.append(perf_counter() - started)
            sleep(pause)
            started = perf_counter()
        return sum(waits[num_first:])

    rate = num_batches * batch_size / max(waiting(0.0), TICK)
    waiting_share = None
    if step_seconds is not None:
        waited = waiting(step_seconds)
        waiting_share = waited / (waited + num_batches * step_seconds)
    stream.close()
    return {
        "num_workers": num_workers,
        "batch_size": batch_size,
        "images_per_second": rate,
        "images_per_second_per_worker": rate / num_workers,
        "step_seconds": step_seconds,
        "waiting_share": waiting_share,
    }


# The command


def run_data(args: argparse.Namespace) -> None:
    """Measure, print the table and write the file.

    Raises:
        ValueError: If an option or a path is wrong, or the file cannot be written.
    """
    check_effect(args, "workers", "batch_size", "batches", "step_seconds")
    if args.output is not None:
        check_writable(args.output / "data.json")
    images = read_jpegs(args.paths, min_side=args.min_side, limit=args.limit)
    size = args.image_size
    speed = measure_data_speed(images, image_size=size, num_rounds=args.steps)
    paths = [
        {"path": "OpenCLIP", "speed": speed["open_clip"], "ratio": 1.0},
        {"path": "clip-pgs", "speed": speed["ours"], "ratio": speed["ratio"]},
    ]
    columns: Columns = {
        "": ("path", 1, "{}"),
        "images/s": ("speed", 1, "{:.0f}"),
        "ratio": ("ratio", 1, "{:.2f}"),
    }
    sys.stdout.write(
        f"{counted(len(images), 'JPEG file')} to crops of {size} x {size} pixels, one core\n\n"
        f"{measured_table(paths, columns)}"
    )
    loader = None if args.workers is None else _run_loader(args, images)
    if args.output is not None:
        path = args.output / "data.json"
        write_json(path, {"image_size": size, **speed, "loader": loader})
        sys.stdout.write(f"\n{path}\n")


def _run_loader(args: argparse.Namespace, images: Sequence[bytes]) -> dict[str, Any]:
    """Measure and print the loader's speed; return what the file says of it."""
    batch_size = args.batch_size or 64
    speed = measure_loader_speed(
        images,
        image_size=args.image_size,
        num_workers=args.workers,
        batch_size=batch_size,
        num_batches=args.batches or 24,
        step_seconds=args.step_seconds,
    )
    columns: Columns = {
        "workers": ("num_workers", 1, "{}"),
        "images/s": ("images_per_second", 1, "{:.0f}"),
        "per worker": ("images_per_second_per_worker", 1, "{:.0f}"),
        "s per batch": ("batch_seconds", 1, "{:.3f}"),
    }
    if args.step_seconds is not None:
        columns["s per step"] = ("step_seconds", 1, "{:g}")
        columns["waiting"] = ("waiting_share", 1, "{:.1%}")
    row = speed | {"batch_seconds": batch_size / speed["images_per_second"]}
    table = measured_table([row], columns)
    sys.stdout.write(f"\nTraining's loader, batches of {batch_size}\n\n{table}")
    return speed
