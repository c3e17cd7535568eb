"""What the processes of a run tell each other of where they are, and which of them hangs."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from urllib.parse import urlsplit

from torch.distributed import TCPStore

STARTING = "starts"
FETCHING = "waits for its samples"
VOTING = "waits for the others"
TRAINING = "trains"
SAVING = "saves"
WAITING = "waits for rank 0"
EVALUATING = "evaluates"
EXPORTING = "writes the export"
# In the order in which a run goes through them.
_ORDER = (STARTING, FETCHING, VOTING, TRAINING, SAVING, EVALUATING, WAITING, EXPORTING)
_STORE_SECONDS = 60


@dataclass(frozen=True)
class Sign:
    """What a process tells of itself.

    Args:
        beat: Grows with every sign.
        step: The step it is at.
        activity: What it does there.
        seconds: For how long.
        host: Its machine.
        process: Its number there.
    """

    beat: int
    step: int
    activity: str
    seconds: float
    host: str
    process: int

    def describe(self) -> str:
        """Say where the process is."""
        return (
            f"where it {self.activity} at step {self.step} (process {self.process} on {self.host})"
        )


def name_hanging(signs: Mapping[int, Sign], *, silent: Mapping[int, float]) -> str:
    """Say in one sentence which rank hangs: one that is silent, or who is furthest behind.

    Args:
        signs: The last sign of each rank that gave one.
        silent: Seconds since it came, for the ranks from which none comes any more.
    """
    if silent:
        rank = min(silent)
        what = f"no sign of life for {silent[rank]:.0f} s"
        if rank not in signs:
            return f"rank {rank} hangs: {what}, and none before"
        what += ", last seen"
    else:
        progress = {r: (sign.step, _ORDER.index(sign.activity)) for r, sign in signs.items()}
        rank = min(progress, key=lambda rank: (progress[rank], rank))
        sign = signs[rank]
        if len(signs) > 1 and len(set(progress.values())) == 1:
            return f"no rank gets on: each {sign.activity} at step {sign.step}"
        what = f"for {sign.seconds:.0f} s"
    return f"rank {rank} hangs: {what} {signs[rank].describe()}"


class Signs:
    """The signs of all processes of a run, through the store by which they met.

    Args:
        address: Host and port of the store.
        rank: This process.
        world_size: Processes.

    Attributes:
        last: The last sign of each rank that gave one.
    """

    def __init__(self, address: tuple[str, int], *, rank: int, world_size: int) -> None:
        # A connection of its own: the run's may be held by whatever hangs.
        timeout = timedelta(seconds=_STORE_SECONDS)
        self._store = TCPStore(*address, is_master=False, timeout=timeout)
        self._rank = rank
        self._heard = dict.fromkeys(range(world_size), time.monotonic())
        self.last: dict[int, Sign] = {}

    def exchange(self, sign: Sign) -> None:
        """Give this process's sign and take in those of all.

        Raises:
            DistError, RuntimeError: If the store is gone, as it is when the launcher or rank 0 is.
        """
        self._store.set(_key(self._rank), json.dumps(asdict(sign)))
        for rank in self._heard:
            if not self._store.check([_key(rank)]):
                continue
            sign = Sign(**json.loads(self._store.get(_key(rank))))
            if rank not in self.last or self.last[rank].beat != sign.beat:
                self.last[rank] = sign
                self._heard[rank] = time.monotonic()

    def silent(self, *, longer_than: float) -> dict[int, float]:
        """Return the ranks that nothing was heard of for so long, and for how many seconds."""
        now = time.monotonic()
        return {r: now - at for r, at in self._heard.items() if now - at > longer_than}


def _key(rank: int) -> str:
    return f"clip_pgs/sign/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def store_address(args: argparse.Namespace) -> tuple[str, int] | None:
    """Return host and port of the run's store, None for one process or another kind of store."""
    if not args.distributed:
        return None
    url = urlsplit(args.dist_url or "env://")
    if url.scheme == "tcp" and url.hostname and url.port:
        return url.hostname, url.port
    if url.scheme == "env":
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return None
