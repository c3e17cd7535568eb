"""How fast JPEG files become training crops, beside OpenCLIP's own path."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time

import open_clip
import torch
from PIL import Image
from torch import Tensor
from webdataset.autodecode import imagehandler

from clip_pgs.data.decoding import faster_transform
from clip_pgs.data.samples import RawSample, SampleDecoder
from clip_pgs.inspection.cost.loader_speed import CAPTION

JPEG_SUFFIXES = (".jpg", ".jpeg")


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


def read_jpegs(paths: Sequence[str | Path], *, min_side: int = 0, limit: int = 512) -> list[bytes]:
    """Read JPEG files out of folders and tar shards.

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
            for data in _jpegs(path):
                if len(found) < limit and max(_size(data)) >= min_side:
                    found.append(data)
        except (OSError, tarfile.TarError) as error:
            raise ValueError(f"cannot read {path}: {error}") from None
    if not found:
        raise ValueError(f"there is no JPEG file with a side of {min_side} pixels or more")
    return found


def measure_data_speed(
    images: Sequence[bytes],
    *,
    image_size: int = 224,
    num_rounds: int,
    tick: Callable[[], object] | None = None,
) -> DataSpeed:
    """Time both paths on the same images, in turns, with one thread.

    Both tokenize a caption, and draw crops in the same way; ours are left as bytes, which training
    normalises on its device. Processor time is measured, which other processes do not lengthen.

    Args:
        images: JPEG files.
        image_size: Side of a crop in pixels.
        num_rounds: Rounds that count; one more comes first.
        tick: Called after every round of a path.
    """
    transform = open_clip.image_transform(image_size, is_train=True)
    tokenize = open_clip.get_tokenizer("ViT-B-16")
    decode = imagehandler("pilrgb")
    decoder = SampleDecoder(faster_transform(transform), tokenize, seed=0)

    def run_ours(data: bytes) -> tuple[Tensor, Tensor]:
        return decoder(RawSample("shard", "key", data, (CAPTION,)), epoch=0)

    def run_open_clip(data: bytes) -> tuple[Tensor, Tensor]:
        return transform(decode("jpg", data)), tokenize(CAPTION.decode())[0]

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times: tuple[list[float], list[float]] = ([], [])
        for round_number in range(num_rounds + 1):
            for run, record in zip((run_ours, run_open_clip), times, strict=True):
                taken = _seconds(run, images)
                if round_number > 0:
                    record.append(taken)
                if tick is not None:
                    tick()
    finally:
        torch.set_num_threads(num_threads)
    ours, theirs = times
    return DataSpeed(
        num_images=len(images),
        ours=len(images) / median(ours),
        open_clip=len(images) / median(theirs),
        ratio=median(other / own for own, other in zip(ours, theirs, strict=True)),
    )


def _seconds(run: Callable[[bytes], object], images: Sequence[bytes]) -> float:
    started = process_time()
    for data in images:
        run(data)
    return process_time() - started


def _jpegs(path: Path) -> list[bytes]:
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in JPEG_SUFFIXES)
        return [file.read_bytes() for file in files]
    if path.suffix != ".tar":
        return [path.read_bytes()]
    with tarfile.open(path) as shard:
        members = [m for m in shard if m.isfile() and m.name.lower().endswith(JPEG_SUFFIXES)]
        streams = [shard.extractfile(member) for member in members]
        return [stream.read() for stream in streams if stream is not None]


def _size(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as image:
        return image.size
