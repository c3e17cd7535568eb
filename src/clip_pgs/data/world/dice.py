"""Random numbers that are the same on every machine and under every library version."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

T = TypeVar("T")

# numpy and Python keep the raw streams of their generators across versions, but not what their
# choice, shuffle or normal make of them. A hash as the source leaves nothing to change.
_NUMBERS_PER_BLOCK = 64


class Dice:
    """Random numbers named by a key.

    Equal keys give equal numbers, and a key one part longer an unrelated stream, so that asking
    for more numbers in one place changes none elsewhere.

    Args:
        *key: What the numbers are for, such as ("train", 17, "background").
    """

    def __init__(self, *key: str | int) -> None:
        self._key = "/".join(str(part) for part in key)
        self._numbers: list[int] = []
        self._num_blocks = 0

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """Draw a number in [low, high)."""
        if not self._numbers:
            stream = self._bytes(f"block {self._num_blocks}", 4 * _NUMBERS_PER_BLOCK)
            self._numbers = np.frombuffer(stream, dtype="<u4").tolist()
            self._num_blocks += 1
        return low + (high - low) * (self._numbers.pop() / 2**32)

    def chance(self, probability: float) -> bool:
        """Return True with a probability in [0, 1]."""
        return self.uniform() < probability

    def choice(self, options: Sequence[T]) -> T:
        """Draw one of the options, each as likely as the others."""
        return options[int(self.uniform(0, len(options)))]

    def noise(self, name: str, height: int, width: int) -> NDArray[np.floating[Any]]:
        """Draw one number in [0, 1) per pixel.

        Args:
            name: Tells several fields of one key apart.
            height: Rows.
            width: Columns.

        Returns:
            Multiples of 1 / 256, shape (height, width).
        """
        stream = np.frombuffer(self._bytes(f"noise {name}", height * width), dtype=np.uint8)
        return stream.reshape(height, width).astype(np.float32) / 256

    def _bytes(self, name: str, num_bytes: int) -> bytes:
        return hashlib.shake_128(f"{self._key}/{name}".encode()).digest(num_bytes)
