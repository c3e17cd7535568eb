"""Loading processes around the batches."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from clip_pgs.data.bad_samples import SkipAccount, StalledDataError
from clip_pgs.data.batches import Batch, PlannedBatches
from clip_pgs.data.commands import end_commands, end_processes
from clip_pgs.data.decoding import time_limit
from clip_pgs.data.streaming import StreamingBatches

_DEAD_WORKER = re.compile(r"DataLoader worker \(pid")
# A worker that is told to leave while it stays at one sample for so long is not waited for.
_LEAVE_SECONDS = 0.5


class _WorkerDeaths:
    """Lets torch raise the error of a dead worker where a batch is awaited, and nowhere else.

    torch hears of it by a signal, and would raise in the middle of whatever the process computes.
    """

    def __init__(self) -> None:
        self._raise: Callable[[int, FrameType | None], Any] | None = None
        self._is_heard = self._has_come = False

    def catch(self) -> None:
        """Stand before torch's handler, which the first loader with workers sets."""
        handler = signal.getsignal(signal.SIGCHLD)
        is_main = threading.current_thread() is threading.main_thread()
        if is_main and callable(handler) and handler != self._note:
            self._raise = handler
            signal.signal(signal.SIGCHLD, self._note)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Hear in the block of a worker that dies, or has died before it.

        Raises:
            RuntimeError: torch's, where one of a loader's died.
        """
        self._is_heard = True
        try:
            if self._has_come:
                self._note(signal.SIGCHLD, None)
            yield
        finally:
            self._is_heard = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._has_come = not self._is_heard
        if self._is_heard and self._raise is not None:
            self._raise(number, frame)


_worker_deaths = _WorkerDeaths()


@dataclass(eq=False)
class SampleStream:
    """Batches of images and texts, epoch by epoch.

    Iterating yields (images, texts): float (B, 3, H, W) and long (B, T), on the CPU, pinned where
    CUDA is available. Skipped samples are logged as warnings: the first few by name, all of them
    as a total. It raises UnusableDataError where no sample, or too few, can be used, and
    StalledDataError where no batch comes in time or a worker dies.

    Args:
        batches: The batches of an epoch.
        account: Counts what is skipped.
        timeout: Seconds to wait for a batch; 0 waits for ever.

    Attributes:
        num_samples: Samples of an epoch over all ranks; None if not known.
        num_batches: Batches of an epoch on each rank; None if not known.
        num_workers: Loading processes, after what the data allows; 0 loads in this one.
    """

    batches: PlannedBatches | StreamingBatches
    account: SkipAccount
    timeout: float = 0.0

    def __post_init__(self) -> None:
        self.num_workers = self.batches.num_workers
        self.num_samples = self.batches.num_samples
        self.num_batches = self.batches.num_batches
        self._loader = self._make_loader()
        # The one that is being read; frames of an error would keep it, and with it the workers.
        self._reader: Iterator[Batch] = iter(())

    @property
    def skipped(self) -> Counter[str]:
        """Samples skipped by reason in the epoch that is being read or was read last."""
        return self.account.counts

    @property
    def is_ordered(self) -> bool:
        """Whether the order is the same for any number of processes, workers and batch size."""
        return isinstance(self.batches, PlannedBatches)

    @property
    def num_batches_left(self) -> int | None:
        """Batches that the next iterator gives; None if not known."""
        return self.batches.num_batches

    def start_at(self, epoch: int, position: int) -> None:
        """Choose where the next iterator begins: at first, epoch 0 and position 0.

        Args:
            epoch: Any epoch; it gives the same batches whatever was read before.
            position: Samples of the epoch, over all ranks, that are left out, unread.
        """
        self.batches.start_at(epoch, position)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.account.start_epoch()
        num_given = 0
        try:
            for batch in self._read_loader():
                self.account.add(batch.skips, num_tried=batch.num_tried)
                if batch.barren:
                    raise self.account.no_usable_sample(batch.barren)
                if batch.images is not None and batch.texts is not None:
                    num_given += 1
                    yield batch.images, batch.texts
            if num_given == 0 and self.batches.num_batches != 0:
                raise self.account.no_usable_sample([])
        except (ValueError, RuntimeError):
            self.close()
            raise
        self.account.finish_epoch()

    def close(self) -> None:
        """End the workers, also those that hang; a new iterator starts others.

        Those that die in the garbage collector are no longer reached by their queues: torch waits
        five seconds for each.
        """
        self._kill_hanging()
        self._reader = iter(())
        self._loader = self._make_loader()

    def _kill_hanging(self) -> None:
        busy = self.batches.status.busy()
        if self.num_workers == 0 or not busy:
            return
        time.sleep(_LEAVE_SECONDS)
        hanging = {process for _, process, *_ in {*busy} & {*self.batches.status.busy()}}
        children = [c for c in multiprocessing.active_children() if c.pid in hanging]
        end_processes(children)

    def _read_loader(self) -> Iterator[Batch]:
        late = f"no batch for {self.timeout:g} seconds"
        what = ""
        # Workers that are at a batch of an earlier iterator end it first.
        try:
            with time_limit(self.timeout, StalledDataError(late)):
                self._reader = iter(self._loader)
        except StalledDataError as error:
            what = str(error)
        if what:
            raise self._stalled(what)
        _worker_deaths.catch()
        while True:
            what = ""
            # Samples seed the generators of the process that decodes them, which may be this one.
            try:
                limited = time_limit(self.timeout, StalledDataError(late))
                with limited, _preserved_generators(), _worker_deaths.heard():
                    batch = next(self._reader, None)
            except StalledDataError as error:
                what = str(error)
            except RuntimeError as error:
                if not _DEAD_WORKER.match(str(error)):
                    raise
                what = "a data worker died"
            # The worker's end of what its batch comes through is gone. torch hears of its death by
            # a signal, and would raise an error anywhere.
            except (ConnectionError, EOFError):
                with suppress(RuntimeError), _worker_deaths.heard():
                    time.sleep(_LEAVE_SECONDS)
                what = "a data worker died"
            # Out here, without the error, whose frames hold the workers.
            if what:
                raise self._stalled(what)
            if batch is None:
                return
            yield batch

    def _stalled(self, what: str) -> StalledDataError:
        busy = [
            f"worker {worker} (process {process}) is at {self.batches.describe(shard, number)}"
            for worker, process, shard, number in self.batches.status.busy()
        ]
        return StalledDataError(
            f"{what}: {'; '.join(busy)}" if busy else f"{what} while no worker was at a sample"
        )

    def _make_loader(self) -> DataLoader[Batch]:
        return DataLoader(
            self.batches,
            batch_size=None,
            sampler=self.batches.sampler,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=hear_parent_alone,
            # The loader draws a number at each start; not from the stream of the run.
            generator=torch.Generator().manual_seed(0),
        )


def hear_parent_alone(worker: int) -> None:
    """Let SIGTERM end this loading process only where its parent sends it, as torch does.

    torchrun signals whole groups of processes, and Slurm all of a job; what the run still needs to
    save must not lose its workers.

    Args:
        worker: Which one it is, as a DataLoader tells it.
    """
    os.setpgid(0, 0)
    sys.excepthook = _say_error
    # Not known to macOS.
    if hasattr(signal, "sigwaitinfo"):
        # Ignored, it would not end a worker that hangs. In a thread of its own, as no handler is
        # told who sent a signal.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_with_parent, daemon=True).start()


def _say_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Print a thread's error, but for that of handing a tensor to a process that no longer reads.

    Where another worker is killed, its parent breaks off what it reads of this one.
    """
    if not isinstance(error, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _leave_with_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        continue
    end_commands()
    os._exit(0)


@contextmanager
def _preserved_generators() -> Iterator[None]:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
