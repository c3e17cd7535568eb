"""Ends a run in which nothing happens any more, and says who hangs and where.

A step of training has a time limit. What takes as long as it takes has none, such as an evaluation,
a disk, or a step of one process on a CPU: there the process hangs when it uses no processor time
either, and no checkpoint grows on its way to the disk. Of
several processes each sends the others heartbeats with its status, so that they can name the one
that keeps them waiting: the one that is silent (stopped, or its machine gone), or else furthest
behind. Who waits for rank 0 to evaluate waits for ever, as long as rank 0 sends heartbeats: it
watches itself. Rank 0 keeps the store through which the heartbeats go: where it is stopped, no
process hears of any, and it is the one that is named. Where this process itself was suspended, as
all are by `docker pause` or Slurm, everything is given its time anew.
"""

from __future__ import annotations

import faulthandler
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch.distributed import DistError, TCPStore

from clip_pgs.common import Pauses
from clip_pgs.data.commands import end_processes
from clip_pgs.training.options import TrainOptions

_STORE_SECONDS = 60
# Share of the time for which a process that waits in vain keeps a processor busy, and more: it
# looks every few seconds whether what it waits for still lives.
_IDLE_SHARE = 0.001
_LAST_WORDS_SECONDS = 10.0
_OWN_THREADS = ("watchdog", "heartbeats")


class Activity:
    """What a process does, in the order in which a run goes through it."""

    STARTING = "starts"
    FETCHING = "waits for its samples"
    VOTING = "waits for the others"
    TRAINING = "trains"
    SAVING = "saves"
    WRITING = "waits for the disk"
    EVALUATING = "evaluates"
    WAITING = "waits for rank 0"
    EXPORTING = "writes the export"


_ORDER = [text for name, text in vars(Activity).items() if name.isupper()]


@dataclass(frozen=True)
class WorkerStatus:
    """What a process tells of itself.

    Args:
        beat: Grows with every heartbeat.
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


def name_hanging(status: Mapping[int, WorkerStatus], *, silent: Mapping[int, float]) -> str:
    """Say in one sentence which rank hangs: one that is silent, or who is furthest behind.

    Args:
        status: The last status of each rank that sent one.
        silent: Seconds since it came, for the ranks from which none comes any more.
    """
    if silent:
        rank = min(silent)
        what = f"no sign of life for {silent[rank]:.0f} s"
        if rank not in status:
            return f"rank {rank} hangs: {what}, and none before"
        return f"rank {rank} hangs: {what}, last seen {status[rank].describe()}"
    progress = {rank: (each.step, _ORDER.index(each.activity)) for rank, each in status.items()}
    rank = min(progress, key=lambda rank: (progress[rank], rank))
    last = status[rank]
    if len(status) > 1 and len(set(progress.values())) == 1:
        return f"no rank gets on: each {last.activity} at step {last.step}"
    return f"rank {rank} hangs: for {last.seconds:.0f} s {last.describe()}"


class Heartbeats:
    """The heartbeats of all processes of a run, through the store by which they met.

    Args:
        address: Host and port of the store.
        rank: This process.
        world_size: Processes.

    Attributes:
        last: The last status of each rank that sent one.
    """

    def __init__(self, address: tuple[str, int], *, rank: int, world_size: int) -> None:
        # A connection of its own: the run's may be held by whatever hangs.
        timeout = timedelta(seconds=_STORE_SECONDS)
        self._store = TCPStore(*address, is_master=False, timeout=timeout)
        self._rank = rank
        self._heard = dict.fromkeys(range(world_size), time.monotonic())
        self.last: dict[int, WorkerStatus] = {}

    def exchange(self, status: WorkerStatus) -> None:
        """Send this process's status and take in those of all.

        Raises:
            DistError, RuntimeError: If the store is gone, as it is when the launcher or rank 0 is.
        """
        self._store.set(_key(self._rank), json.dumps(asdict(status)))
        for rank in self._heard:
            if not self._store.check([_key(rank)]):
                continue
            status = WorkerStatus(**json.loads(self._store.get(_key(rank))))
            if rank not in self.last or self.last[rank].beat != status.beat:
                self.last[rank] = status
                self._heard[rank] = time.monotonic()

    def silent(self, *, longer_than: float) -> dict[int, float]:
        """Return the ranks that nothing was heard of for so long, and for how many seconds."""
        now = time.monotonic()
        return {r: now - at for r, at in self._heard.items() if now - at > longer_than}


def _key(rank: int) -> str:
    # A store of torchrun's lasts over restarts, which its machines need not count alike.
    is_torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if is_torchruns else "0"
    return f"clip_pgs/heartbeat/{attempt}/{rank}"


@dataclass(frozen=True)
class _Current:
    """What this process does since when, and the seconds that it may take; None for any."""

    name: str
    step: int
    since: float
    limit: float | None


class Watchdog:
    """Watches this process from a thread, and the run's other processes with it.

    Args:
        options: `rank` and `world_size`; `hang_timeout` in seconds, 0 watches nothing.
        on_hang: Is given the sentence, in the thread, before the process is ended.

    Attributes:
        written: Returns the bytes that rank 0 has written of its checkpoints. Where they grow,
            who waits for the disk does not hang.
    """

    def __init__(self, options: TrainOptions, *, on_hang: Callable[[str], object]) -> None:
        self._rank = options.rank
        self._world_size = options.world_size
        self._timeout = options.hang_timeout
        # A CPU may work at a step for an hour; a GPU that hangs keeps a processor busy.
        self._has_deadlines = self._world_size > 1 or torch.device(options.device).type != "cpu"
        self._on_hang = on_hang
        self._done = threading.Event()
        self.written: Callable[[], int] = lambda: 0
        self._worked, self._worked_at = (0.0, 0), 0.0
        # Until when all were suspended, and until when rank 0 was seen to wait for the disk.
        self._resumed_at = self._stored_at = 0.0
        self._pauses = Pauses(self._timeout)
        self._interval = self._pauses.interval
        self._heartbeats: Heartbeats | None = None
        self.allow(Activity.STARTING, step=0)

    @contextmanager
    def watching(self, options: TrainOptions) -> Iterator[None]:
        """Watch while the block runs."""
        if self._timeout <= 0:
            yield
            return
        threads = [threading.Thread(target=self._watch, name=_OWN_THREADS[0], daemon=True)]
        address = _store_address(options)
        if address is not None:
            self._heartbeats = Heartbeats(address, rank=self._rank, world_size=self._world_size)
            # A store that is stopped never answers, and who waits for it cannot watch.
            threads.append(threading.Thread(target=self._beat, name=_OWN_THREADS[1], daemon=True))
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._done.set()
            for thread in threads:
                thread.join(self._timeout)

    def note(self, activity: str, *, step: int, patience: float = 1.0) -> None:
        """Note what this process begins to do, and how many timeouts it may take."""
        limit = patience * self._timeout
        self._current = _Current(activity, step, time.monotonic(), limit)

    def allow(self, activity: str, *, step: int) -> None:
        """Note what rank 0 begins, such as an evaluation: it may take as long as it takes.

        The other processes wait for it.
        """
        name = activity if self._rank == 0 else Activity.WAITING
        self._current = _Current(name, step, time.monotonic(), limit=None)

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            now = time.monotonic()
            if self._pauses.look():
                self._resumed_at = now
            if now > self._resumed_at + self._timeout and self._is_late():
                self._end_process(self._status())

    def _beat(self) -> None:
        assert self._heartbeats is not None
        beat = 0
        while not self._done.wait(self._interval):
            with suppress(DistError, RuntimeError):
                # The run itself finds out, when the store is gone.
                self._heartbeats.exchange(self._status(beat))
            beat += 1

    def _is_late(self) -> bool:
        current, now = self._current, time.monotonic()
        if current.limit is not None and self._has_deadlines:
            if self._first_writes():
                self._stored_at = now
            return now > max(current.since, self._resumed_at, self._stored_at) + current.limit
        if self._rank != 0:
            return bool(self._silent(longer_than=self._timeout))
        worked = _seconds_worked(), self.written()
        is_idle = abs(worked[0] - self._worked[0]) < _IDLE_SHARE * self._timeout
        if current.since > self._worked_at or not is_idle or worked[1] != self._worked[1]:
            self._worked, self._worked_at = worked, now
        return now > self._worked_at + self._timeout

    def _first_writes(self) -> bool:
        """Return whether rank 0, which watches itself meanwhile, was just seen to wait."""
        if self._rank == 0 or self._heartbeats is None:
            return False
        last = self._heartbeats.last.get(0)
        is_heard = 0 not in self._silent(longer_than=self._few_turns())
        return is_heard and last is not None and last.activity == Activity.WRITING

    def _few_turns(self) -> float:
        """Return for how many seconds nobody is silent but by being stopped."""
        return max(4 * self._interval, 2.0)

    def _silent(self, *, longer_than: float) -> dict[int, float]:
        return {} if self._heartbeats is None else self._heartbeats.silent(longer_than=longer_than)

    def _status(self, beat: int = 0) -> WorkerStatus:
        current = self._current
        seconds = time.monotonic() - current.since
        host = socket.gethostname()
        return WorkerStatus(beat, current.step, current.name, seconds, host, os.getpid())

    def _end_process(self, status: WorkerStatus) -> None:
        # What hangs may hold the lock that a last word needs.
        threading.Timer(_LAST_WORDS_SECONDS, os._exit, (1,)).start()
        self._on_hang(f"{self._name_hanging(status)}; --hang-timeout is {self._timeout:g} s")
        faulthandler.dump_traceback(all_threads=True)
        end_processes(multiprocessing.active_children())
        # The main thread may be where no exception reaches it.
        os._exit(1)

    def _name_hanging(self, status: WorkerStatus) -> str:
        if self._world_size == 1:
            return f"the run hangs: for {status.seconds:.0f} s {status.describe()}"
        if self._rank == 0 and self._current.limit is None:
            return name_hanging({0: status}, silent={})
        silent = self._silent(longer_than=self._few_turns())
        last = {self._rank: status} if self._heartbeats is None else dict(self._heartbeats.last)
        return name_hanging(last, silent=silent)


def _store_address(options: TrainOptions) -> tuple[str, int] | None:
    """Return host and port of the run's store, None for one process or another kind of store."""
    if not options.distributed:
        return None
    url = urlsplit(options.dist_url or "env://")
    if url.scheme == "tcp" and url.hostname and url.port:
        return url.hostname, url.port
    if url.scheme == "env":
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return None


def _seconds_worked() -> float:
    """Return the processor time of Python's threads but the watchdog's.

    Others of this process may answer what other processes ask of a store that it keeps.
    """
    threads = [
        thread.native_id for thread in threading.enumerate() if thread.name not in _OWN_THREADS
    ]
    try:
        texts = [
            Path(f"/proc/self/task/{number}/schedstat").read_text("utf-8") for number in threads
        ]
    except OSError:
        # A thread that has just ended, or a system that tells this of whole processes alone.
        return time.process_time() - time.thread_time()
    return sum(int(text.split()[0]) for text in texts) / 1e9
