"""How fast JPEG files become training crops, and whether steps wait for them: the command `data`.

OpenCLIP's own path decodes and crops the same files beside ours, and training's own loader can run
beside steps of a given length.
"""

from __future__ import annotations

import argparse
import sys
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter, process_time, sleep
from typing import Any

import open_clip
import torch
from torch import Tensor
from tqdm import tqdm
from webdataset.autodecode import imagehandler

from clip_pgs.common import check_writable
from clip_pgs.data.batches import Batching, PlannedBatches
from clip_pgs.data.decoding import UnreadableImageError, faster_transform, open_image
from clip_pgs.data.loader import SampleStream
from clip_pgs.data.plan import RowPlan, SampleRef
from clip_pgs.data.samples import RawSample, SampleDecoder
from clip_pgs.data.skips import Skip, SkipAccount
from clip_pgs.inspection.cost.step import TICK, number_cell, write_json
from clip_pgs.tables import Table

CAPTION = b"a dog runs over the grass with a ball in its mouth"
JPEG_SUFFIXES = (".jpg", ".jpeg")


def read_jpegs(paths: Sequence[str | Path], *, min_side: int = 0, limit: int = 512) -> list[bytes]:
    """Read JPEG files out of folders and tar shards; what is damaged or of another kind is left.

    Args:
        paths: Image files, folders of them, or shards.
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
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
    if not found:
        raise ValueError(f"there is no JPEG file with a side of {min_side} pixels or more")
    return found


def _files(path: Path) -> Iterator[bytes]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in JPEG_SUFFIXES)
        yield from (file.read_bytes() for file in files)
    elif path.suffix != ".tar":
        yield path.read_bytes()
    else:
        with tarfile.open(path) as shard:
            for member in shard:
                stream = shard.extractfile(member) if member.isfile() else None
                if stream is not None and member.name.lower().endswith(JPEG_SUFFIXES):
                    yield stream.read()


def our_decoder(image_size: int) -> SampleDecoder:
    """Return what decodes, crops and tokenizes samples in training."""
    transform = open_clip.image_transform(image_size, is_train=True)
    return SampleDecoder(faster_transform(transform), open_clip.get_tokenizer("ViT-B-16"), seed=0)


# One core


@dataclass(frozen=True)
class DataSpeed:
    """Images per second of one core, and how the two paths compare.

    Attributes:
        num_images: Images of a round.
        ours: Images per second, this package's path, median over rounds.
        open_clip: The same of OpenCLIP's.
        ratio: `ours` over `open_clip`, median of the rounds' ratios.
    """

    num_images: int
    ours: float
    open_clip: float
    ratio: float


def measure_data_speed(
    images: Sequence[bytes],
    *,
    image_size: int = 224,
    num_rounds: int,
    tick: Callable[[], object] | None = None,
) -> DataSpeed:
    """Time both paths on the same images, in turns, with one thread.

    Both tokenize a caption, and draw crops in the same way; ours are left as bytes, which training
    normalizes on its device. Processor time is measured, which other processes do not lengthen.

    Args:
        images: JPEG files.
        image_size: Side of a crop in pixels.
        num_rounds: Rounds that count; one more comes first.
        tick: Called after every round of a path.
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
    try:
        for _ in range(num_rounds + 1):
            for run, record in ((run_ours, ours), (run_open_clip, theirs)):
                started = process_time()
                for data in images:
                    run(data)
                record.append(max(process_time() - started, TICK))
                if tick is not None:
                    tick()
    finally:
        torch.set_num_threads(num_threads)
    del ours[0], theirs[0]
    return DataSpeed(
        num_images=len(images),
        ours=len(images) / median(ours),
        open_clip=len(images) / median(theirs),
        ratio=median(other / own for own, other in zip(ours, theirs, strict=True)),
    )


# Training's loader


@dataclass(frozen=True)
class LoaderSpeed:
    """What a loader gives, by the clock.

    Attributes:
        num_workers: Its processes.
        batch_size: Images of a batch.
        images_per_second: Where each batch is asked for as soon as the last one came.
        images_per_second_per_worker: The same of one process.
        step_seconds: What a step takes that wants a batch; None where none was tried.
        waiting_share: Share of a step's time, waiting included, in which it waits for its batch.
    """

    num_workers: int
    batch_size: int
    images_per_second: float
    images_per_second_per_worker: float
    step_seconds: float | None
    waiting_share: float | None


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
    tick: Callable[[], object] | None = None,
) -> LoaderSpeed:
    """Time a loader, at first alone and then beside steps of a given length.

    A step is a pause, which leaves the machine's cores to the workers, as a GPU's step does.

    Args:
        images: JPEG files; they come again and again, cropped anew.
        image_size: Side of a crop in pixels.
        num_workers: Loading processes, at least 1.
        batch_size: Images of a batch.
        num_batches: Batches that count; those that workers make in advance come first.
        step_seconds: What a step takes; None leaves the second part out.
        tick: Called after every batch.
    """
    num_first = num_early_batches(num_workers)
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
        for _ in stream:
            waits.append(perf_counter() - started)
            if tick is not None:
                tick()
            sleep(pause)
            started = perf_counter()
        return sum(waits[num_first:])

    rate = num_batches * batch_size / max(waiting(0.0), TICK)
    waiting_share = None
    if step_seconds is not None:
        waited = waiting(step_seconds)
        waiting_share = waited / (waited + num_batches * step_seconds)
    stream.close()
    return LoaderSpeed(
        num_workers=num_workers,
        batch_size=batch_size,
        images_per_second=rate,
        images_per_second_per_worker=rate / num_workers,
        step_seconds=step_seconds,
        waiting_share=waiting_share,
    )


def num_early_batches(num_workers: int) -> int:
    """Return how many batches do not count: each worker starts, and makes two in advance."""
    return 3 * num_workers


# The command


def run_data(args: argparse.Namespace) -> None:
    """Measure, print the table and write the file.

    Raises:
        ValueError: If an option or a path is wrong, or the file cannot be written.
    """
    if args.step_seconds is not None and args.workers is None:
        raise ValueError("--step-seconds needs --workers, whose batches the steps wait for")
    if args.output is not None:
        check_writable(args.output / "data.json")
    images = read_jpegs(args.paths, min_side=args.min_side, limit=args.limit)
    size, total = args.image_size, 2 * (args.steps + 1)
    with tqdm(total=total, leave=False, disable=not sys.stderr.isatty()) as bar:
        speed = measure_data_speed(images, image_size=size, num_rounds=args.steps, tick=bar.update)
    lines = [
        ["OpenCLIP", number_cell(speed.open_clip, "{:.0f}"), number_cell(1.0, "{:.2f}")],
        ["clip-pgs", number_cell(speed.ours, "{:.0f}"), number_cell(speed.ratio, "{:.2f}")],
    ]
    sys.stdout.write(
        f"{speed.num_images} JPEG files to crops of {size} x {size} pixels, one core\n\n"
        f"{Table.of(['', 'images/s', 'ratio'], lines).text()}"
    )
    loader = None if args.workers is None else _run_loader(args, images)
    if args.output is not None:
        path = args.output / "data.json"
        write_json(path, {"image_size": size, **asdict(speed), "loader": loader})
        sys.stdout.write(f"\n{path}\n")


def _run_loader(args: argparse.Namespace, images: list[bytes]) -> dict[str, Any]:
    """Measure and print what the loader gives; return what the file says of it."""
    num_passes = 1 if args.step_seconds is None else 2
    total = num_passes * (num_early_batches(args.workers) + args.batches)
    with tqdm(total=total, leave=False, disable=not sys.stderr.isatty()) as bar:
        speed = measure_loader_speed(
            images,
            image_size=args.image_size,
            num_workers=args.workers,
            batch_size=args.batch_size,
            num_batches=args.batches,
            step_seconds=args.step_seconds,
            tick=bar.update,
        )
    cells = {
        "workers": number_cell(speed.num_workers, "{}"),
        "images/s": number_cell(speed.images_per_second, "{:.0f}"),
        "per worker": number_cell(speed.images_per_second_per_worker, "{:.0f}"),
        "s per batch": number_cell(speed.batch_size / speed.images_per_second, "{:.3f}"),
    }
    if speed.waiting_share is not None:
        cells["s per step"] = number_cell(speed.step_seconds, "{:g}")
        cells["waiting"] = number_cell(speed.waiting_share, "{:.1%}")
    table = Table.of(list(cells), [list(cells.values())]).text()
    sys.stdout.write(f"\nTraining's loader, batches of {speed.batch_size}\n\n{table}")
    return asdict(speed)
