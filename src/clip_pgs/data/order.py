"""The order of samples, as a function of seeds and positions alone.

Nothing here keeps state: OpenCLIP's sample shuffle seeds itself from process id and time, so that
no two of its runs see the same order.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """Whose part of the data is meant.

    Args:
        rank: The process, in [0, world_size).
        world_size: Number of processes.
        worker: The loader's worker within the process, in [0, num_workers).
        num_workers: Workers per process, at least 1.
    """

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    num_workers: int = 1

    def deal(self, items: Sequence[T]) -> list[T]:
        """Return this share of the items: to ranks in turn, then to the rank's workers in turn."""
        return list(items[self.rank :: self.world_size][self.worker :: self.num_workers])


def stable_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2**63) that depends on the parts alone, on every machine."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def shuffled(items: Iterable[T], *parts: int | str) -> list[T]:
    """Return the items in an order that depends on the parts alone."""
    order = list(items)
    random.Random(stable_seed(*parts)).shuffle(order)
    return order


def permutation(size: int, *parts: int | str) -> np.ndarray:
    """Return the numbers below `size` in an order that depends on the parts alone.

    Returns:
        Shape (size,), the smallest unsigned integers that hold them.
    """
    # Numpy promises the numbers of RandomState, and of no other generator, for all time.
    generator = np.random.RandomState(stable_seed(*parts) % 2**32)
    return generator.permutation(size).astype(np.min_scalar_type(max(size - 1, 0)))


def shuffled_stream(
    items: Iterable[T], *parts: int | str, buffer_size: int, initial_size: int
) -> Iterator[T]:
    """Shuffle a stream through a buffer, in an order that depends on the parts alone.

    Args:
        items: The stream.
        *parts: The seed; see `stable_seed`.
        buffer_size: Items held at most.
        initial_size: Items read before the first comes out; from there the buffer grows by one
            with each that does, so that a run need not wait for a full one.
    """
    rng = random.Random(stable_seed(*parts))
    buffer: list[T] = []
    num_out = 0
    for item in items:
        buffer.append(item)
        if len(buffer) > min(buffer_size, initial_size + num_out):
            num_out += 1
            yield _take_random(buffer, rng)
    while buffer:
        yield _take_random(buffer, rng)


def _take_random(buffer: list[T], rng: random.Random) -> T:
    index = rng.randrange(len(buffer))
    buffer[index], buffer[-1] = buffer[-1], buffer[index]
    return buffer.pop()
