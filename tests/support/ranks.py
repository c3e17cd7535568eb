"""The processes of a run without a launcher: a fork each, not an import."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_PRELOADED = ["clip_pgs.training.__main__", "clip_pgs.training.trainer", "clip_pgs.training.checks"]
_LAUNCH_SECONDS = 90


@dataclass(frozen=True)
class Stop:
    """A signal that one rank gets when it has taken a step of the run."""

    rank: int
    step: int
    number: signal.Signals


@dataclass(frozen=True)
class Hang:
    """What one rank does once, for ever or for some seconds of a processor's time.

    Args:
        rank: The process.
        activity: "trains" or "evaluates"; "stopped" stops the whole process while it trains,
            "suspended" all of them; "writes" what a slow disk does to a checkpoint.
        busy_seconds: None does nothing, for ever. For so long all are suspended, and so long a
            disk takes, bit by bit.
        stops_at: The step after which the process is asked to leave.
    """

    rank: int
    activity: str
    busy_seconds: float | None = None
    stops_at: int | None = None


def train_together(
    folder: Path, argv: list[str], *, num_processes: int = 2, trouble: Stop | Hang | None = None
) -> list[int]:
    """Train in several processes and return their exit codes, negative for a signal.

    When one is killed the others are, too, as on a machine that loses its power.

    Args:
        folder: Where what they print is appended to `rank_N.txt`.
        argv: Flags of training.
        num_processes: How many.
        trouble: What happens on the way.
    """
    context = _context()
    port = _free_port()
    places = [(rank, num_processes, port) for rank in range(num_processes)]
    processes = [
        context.Process(target=_train, args=(folder, argv, place, trouble)) for place in places
    ]
    for process in processes:
        process.start()
    if isinstance(trouble, Stop) and trouble.number == signal.SIGKILL:
        processes[trouble.rank].join(_LAUNCH_SECONDS)
        for process in processes:
            process.kill()
    elif isinstance(trouble, Hang) and trouble.busy_seconds is None:
        # One ends by the watchdog, and torchrun would then end the others.
        multiprocessing.connection.wait([each.sentinel for each in processes], _LAUNCH_SECONDS)
        for process in processes:
            process.terminate()
        if trouble.activity == "stopped":
            processes[trouble.rank].kill()
    elif isinstance(trouble, Hang) and trouble.activity == "suspended":
        _suspend([each.pid for each in processes], processes[trouble.rank].pid, trouble)
    for process in processes:
        process.join(_LAUNCH_SECONDS)
    return [process.exitcode for process in processes]


def _suspend(numbers: list[int], first: int, trouble: Hang) -> None:
    """Stop all processes for a while, once the first has stopped itself."""
    end = time.monotonic() + _LAUNCH_SECONDS
    while Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        assert time.monotonic() < end
        time.sleep(0.05)
    for number in numbers:
        os.kill(number, signal.SIGSTOP)
    time.sleep(trouble.busy_seconds)
    for number in numbers:
        os.kill(number, signal.SIGCONT)


def run_together(function: Callable[[Path], object], folder: Path) -> list[int]:
    """Call a function with the folder in two processes of one group; return their exit codes.

    What they print is appended to `rank_N.txt` there.
    """
    processes = [_context().Process(target=_call, args=(function, folder, n)) for n in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_LAUNCH_SECONDS)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _call(function: Callable[[Path], object], folder: Path, rank: int) -> None:
    _print_to(folder / f"rank_{rank}.txt")
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    place = {"init_method": f"file://{folder / 'meet'}", "rank": rank, "world_size": 2}
    distributed.init_process_group("gloo", **place)
    function(folder)
    distributed.destroy_process_group()


def _print_to(path: Path) -> None:
    with path.open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def output(folder: Path) -> str:
    """Return what the ranks printed up to now."""
    return "\n".join(path.read_text() for path in sorted(folder.glob("rank_*.txt")))


def _train(
    folder: Path, argv: list[str], place: tuple[int, int, int], trouble: Stop | Hang | None
) -> None:
    rank, num_processes, port = place
    _print_to(folder / f"rank_{rank}.txt")
    if num_processes > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    from clip_pgs.training.__main__ import main
    from clip_pgs.training.stop import leave

    if trouble is not None and trouble.rank == rank:
        _prepare(trouble)
    # Data workers as they are of a process that no process forked.
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    leave(main(argv))


def _prepare(trouble: Stop | Hang) -> None:
    from clip_pgs.training.trainer import PhaseTrainer, Trainer
    from clip_pgs.training.validation import Validation

    if isinstance(trouble, Hang) and trouble.stops_at is not None:
        stop = Stop(trouble.rank, trouble.stops_at, signal.SIGTERM)
        _replace(Trainer, "save_if_due", after=lambda run, _: _signal_at(stop, run.step))
    if isinstance(trouble, Stop):
        _replace(Trainer, "save_if_due", after=lambda run, _: _signal_at(trouble, run.step))
    elif trouble.activity == "writes":
        _slow_down(trouble.busy_seconds)
    elif trouble.activity in ("trains", "stopped", "suspended"):
        # The first step has more patience, and a busy one goes on after the second.
        _replace(PhaseTrainer, "train_step", after=lambda trainer, _: _hang_after(trainer, trouble))
    else:
        _replace(Validation, "run", after=lambda *_, **__: _hang(trouble))


def _slow_down(seconds: float | None) -> None:
    """Let the first checkpoint take so long, and no processor's time; None, for ever."""
    from clip_pgs.training.checkpoint import _HashingWriter

    begun = []

    def wait(*_):
        begun.append(time.monotonic())
        if seconds is None or begun[-1] < begun[0] + seconds:
            time.sleep(0.2 if seconds is not None else 2 * _LAUNCH_SECONDS)

    _replace(_HashingWriter, "write", after=wait)


def _replace(owner: type, name: str, *, after: Callable[..., object]) -> None:
    before = getattr(owner, name)

    def method(*args, **options):
        result = before(*args, **options)
        after(*args, **options)
        return result

    setattr(owner, name, method)


def _signal_at(stop: Stop, step: int) -> None:
    if step == stop.step:
        os.kill(os.getpid(), stop.number)


def _hang_after(trainer, hang: Hang) -> None:
    if trainer.position == 2 * trainer.phase.samples_per_step:
        _hang(hang)


def _hang(hang: Hang) -> None:
    if hang.activity in ("stopped", "suspended"):
        os.kill(os.getpid(), signal.SIGSTOP)
    if hang.activity == "suspended":
        return
    if hang.busy_seconds is None:
        signal.pause()
    end = time.process_time() + (hang.busy_seconds or 0)
    while time.process_time() < end:
        continue


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
