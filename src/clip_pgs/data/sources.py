"""Data whose samples can be read in any order."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from pathlib import Path

from PIL import Image

from clip_pgs.data.epoch_plan import SampleRef
from clip_pgs.data.samples import RawSample, Skip
from clip_pgs.data.tables import PairTable


class Source(ABC):
    """What a loader's workers read from."""

    @abstractmethod
    def read(self, ref: SampleRef) -> RawSample | Skip:
        """Read a sample, or say why it cannot be read."""

    @abstractmethod
    def describe(self, part: int, number: int) -> str:
        """Return the place of a sample in words."""


class TableSource(Source):
    """Pairs of a table; image paths are relative to the working directory, as OpenCLIP's are."""

    def __init__(self, table: PairTable) -> None:
        self.table = table

    def read(self, ref: SampleRef) -> RawSample | Skip:
        """Read one row's image file."""
        shard, path = str(self.table.path), self.table.images[ref.number]
        # Rows count from 1 below the header, as a reader of the table counts them.
        key = f"row {ref.number + 1}"
        try:
            image = Path(path).read_bytes()
        except (OSError, ValueError) as error:
            return Skip(shard, key, "unreadable image file", str(error))
        return RawSample(shard, key, image, self.table.captions[ref.number].encode(), ref.visit)

    def describe(self, part: int, number: int) -> str:
        """Return the row and its image's path."""
        return f"{self.table.path}: row {number + 1} ({self.table.images[number]})"


class BlankSource(Source):
    """Black images with one caption, to measure the speed of training without data.

    Args:
        size: (height, width) of the images.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        buffer = io.BytesIO()
        Image.new("RGB", size[::-1]).save(buffer, format="PNG")
        self.image = buffer.getvalue()

    def read(self, ref: SampleRef) -> RawSample | Skip:
        """Return the one sample there is."""
        return RawSample("synthetic", str(ref.number), self.image, b"Dummy caption", ref.visit)

    def describe(self, part: int, number: int) -> str:
        """Return the number of the sample."""
        return f"synthetic: {number}"
