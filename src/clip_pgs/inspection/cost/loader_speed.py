"""How well data workers keep up with a training step, through the loader that training uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter, sleep

import open_clip

from clip_pgs.data.batches import BatchPositions, PlannedBatches, WorkerStatus
from clip_pgs.data.decoding import faster_transform
from clip_pgs.data.loader import SampleStream
from clip_pgs.data.plan import RowPlan, SampleRef
from clip_pgs.data.samples import RawSample, SampleDecoder
from clip_pgs.data.skips import Skip, SkipAccount

CAPTION = b"a dog runs over the grass with a ball in its mouth"


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
    stream = _open_stream(
        images,
        image_size=image_size,
        num_workers=num_workers,
        batch_size=batch_size,
        num_batches=num_first + num_batches,
    )
    alone = sum(_waits(stream, 0.0, tick)[num_first:])
    waiting_share = None
    if step_seconds is not None:
        waited = sum(_waits(stream, step_seconds, tick)[num_first:])
        waiting_share = waited / (waited + num_batches * step_seconds)
    stream.close()
    rate = num_batches * batch_size / alone
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


def _open_stream(
    images: Sequence[bytes],
    *,
    image_size: int,
    num_workers: int,
    batch_size: int,
    num_batches: int,
) -> SampleStream:
    transform = open_clip.image_transform(image_size, is_train=True)
    tokenize = open_clip.get_tokenizer("ViT-B-16")
    batches = PlannedBatches(
        JpegSource(images),
        RowPlan(len(images), seed=0),
        SampleDecoder(faster_transform(transform), tokenize, seed=0),
        BatchPositions(num_batches * batch_size, batch_size=batch_size, num_per_step=1),
        WorkerStatus(num_workers),
        refill=True,
    )
    return SampleStream(
        batches,
        SkipAccount(),
        num_workers=num_workers,
        num_samples=num_batches * batch_size,
        num_batches=num_batches,
    )


def _waits(
    stream: SampleStream, step_seconds: float, tick: Callable[[], object] | None
) -> list[float]:
    """Return how long each batch of an epoch was waited for, in seconds."""
    waits = []
    started = perf_counter()
    for _ in stream:
        waits.append(perf_counter() - started)
        if tick is not None:
            tick()
        sleep(step_seconds)
        started = perf_counter()
    return waits
