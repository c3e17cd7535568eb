"""Processes of a torchrun launch that share data sets between them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed as dist


class Ranks:
    """This process among those of the launch.

    Args:
        rank: Its number, from 0.
        world_size: How many there are.
        local_rank: Its number on this machine.
    """

    def __init__(self, rank: int = 0, world_size: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value on every rank, in their order, once all have come.

        Args:
            value: What pickle takes.
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


@contextmanager
def join_ranks() -> Iterator[Ranks]:
    """Join the processes that torchrun started, and leave them at the end.

    Yields:
        This process among them; the only one where there was no torchrun.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Ranks()
        return
    # Ranks meet at the end alone, and the largest data set may take hours longer than the rest.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        yield Ranks(dist.get_rank(), world_size, int(os.environ.get("LOCAL_RANK", "0")))
    finally:
        dist.destroy_process_group()
