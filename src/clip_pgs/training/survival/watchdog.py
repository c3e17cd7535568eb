"""Names the process that keeps all others waiting, and ends the run.

Every process tells the others, through the store by which they met, which step it is at and what
it does there. One that is silent (stopped, or its machine gone), or else the one that is furthest
behind, is the one that hangs: the others merely wait for it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from urllib.parse import urlsplit

from torch.distributed import DistError, TCPStore

_logger = logging.getLogger(__name__)

# In the order in which a step goes through them.
FETCHING = "waits for its samples"
VOTING = "waits for the others"
TRAINING = "trains"
SAVING = "saves"
_ORDER = (FETCHING, VOTING, TRAINING, SAVING)
_MAX_INTERVAL = 10.0


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


def name_hanging(signs: Mapping[int, Sign], *, silent: Mapping[int, float]) -> str:
    """Say in one sentence which rank hangs.

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
        if len(set(progress.values())) == 1:
            return f"no rank gets on: each {sign.activity} at step {sign.step}"
        what = f"for {sign.seconds:.0f} s"
    sign = signs[rank]
    return (
        f"rank {rank} hangs: {what} where it {sign.activity} at step {sign.step} "
        f"(process {sign.process} on {sign.host})"
    )


class Watchdog:
    """Watches the processes of a run from a thread in each.

    Args:
        args: Options, with `rank` and `world_size`; `hang_timeout` in seconds, 0 watches nothing.
        on_hang: Is given the sentence, in the thread, before the process is ended.
    """

    def __init__(self, args: argparse.Namespace, *, on_hang: Callable[[str], object]) -> None:
        self._rank = args.rank
        self._world_size = args.world_size
        self._timeout = args.hang_timeout
        self._on_hang = on_hang
        self._now = (0, FETCHING, time.monotonic())
        self._deadline = float("inf")
        self._done = threading.Event()
        self._thread: threading.Thread | None = None
        address = _store_address(args)
        if address is not None and self._timeout > 0:
            self._interval = min(self._timeout / 5, _MAX_INTERVAL)
            # A connection of its own: the run's may be held by whatever hangs.
            self._store = TCPStore(*address, is_master=False, timeout=timedelta(seconds=60))
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def note(self, step: int, activity: str, *, patience: float = 1.0) -> None:
        """Note what this process begins to do, and how many timeouts it may take."""
        now = time.monotonic()
        self._now = (step, activity, now)
        self._deadline = now + patience * self._timeout

    def pause(self) -> None:
        """Let what follows, such as an evaluation, take as long as it takes."""
        self._deadline = float("inf")

    def close(self) -> None:
        """Stop watching."""
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        others = _Others(self._store, self._world_size)
        number = 0
        while True:
            with suppress(DistError, RuntimeError):
                # The store ends with the launcher or with rank 0, as the run itself finds out.
                self._store.set(_key(self._rank), json.dumps(asdict(self._sign(number))))
                others.listen()
            if time.monotonic() > self._deadline:
                self._bark(others)
            if self._done.wait(self._interval):
                return
            number += 1

    def _sign(self, number: int) -> Sign:
        step, activity, since = self._now
        seconds = time.monotonic() - since
        return Sign(number, step, activity, seconds, socket.gethostname(), os.getpid())

    def _bark(self, others: _Others) -> None:
        # Nobody misses this many turns but by being stopped.
        silent = others.silent(longer_than=max(4 * self._interval, 2.0))
        sentence = name_hanging(others.signs, silent=silent)
        self._on_hang(f"{sentence}; --hang-timeout is {self._timeout:g} s")
        faulthandler.dump_traceback(all_threads=True)
        # The main thread may be where no exception reaches it.
        os._exit(1)


class _Others:
    """What all processes told of themselves, and when."""

    def __init__(self, store: TCPStore, world_size: int) -> None:
        self.signs: dict[int, Sign] = {}
        self._store = store
        now = time.monotonic()
        self._heard = dict.fromkeys(range(world_size), now)

    def listen(self) -> None:
        """Take in the latest signs."""
        for rank in self._heard:
            if not self._store.check([_key(rank)]):
                continue
            sign = Sign(**json.loads(self._store.get(_key(rank))))
            if rank not in self.signs or self.signs[rank].beat != sign.beat:
                self.signs[rank] = sign
                self._heard[rank] = time.monotonic()

    def silent(self, *, longer_than: float) -> dict[int, float]:
        """Return the ranks that nothing was heard of for so long, and for how many seconds."""
        now = time.monotonic()
        return {r: now - at for r, at in self._heard.items() if now - at > longer_than}


def _key(rank: int) -> str:
    return f"clip_pgs/sign/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"


def _store_address(args: argparse.Namespace) -> tuple[str, int] | None:
    """Return host and port of the run's store, None for one process or another kind of store."""
    if not args.distributed:
        return None
    url = urlsplit(args.dist_url or "env://")
    if url.scheme == "tcp" and url.hostname and url.port:
        return url.hostname, url.port
    if url.scheme == "env":
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return None
