"""Training and evaluation in one process, or by torchrun in several, with the run's exit code.

    NPROC_PER_NODE            processes on this machine; --nproc wins [its GPUs, or 1]
    NNODES                    machines; each starts the same command [1], with
    NODE_RANK                 its number, from 0,
    MASTER_ADDR, MASTER_PORT  where machine 0 is reached [none, 29500]
    MAX_RESTARTS              times that processes start again after one has died [0]
    OMP_NUM_THREADS           CPU threads of a process [cores / processes]

torchrun ends with 1 whatever ended a run, below pages of its own. So bad input is refused here
before it starts, the first signal is passed on, and the run leaves its exit code and its reason in
a folder of the launch's own. torch is imported after the options are known to be good.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from clip_pgs.common import (
    BAD_INPUT,
    FAILED,
    INTERRUPTED,
    PREEMPTED,
    catching,
    one_sentence,
    refuse,
    run_program,
)
from clip_pgs.integrations import MAE_TYPE
from clip_pgs.training.stop import LAUNCH_FOLDER, leave

TRAINING, EVALUATION = "clip_pgs.training", "clip_pgs.evaluation"
_GPU_TOOLS = ("nvidia-smi", "rocm-smi")
_GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd")
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
# In the folder of a launch, which process ended first and how, where no signal asked it to.
_LOST_NAME = "lost"


def train_autoencoder(argv: Sequence[str]) -> int:
    """Do what `train` does, for configs of masked autoencoders alone."""
    return train(argv, wants_autoencoder=True)


def train(argv: Sequence[str], *, wants_autoencoder: bool = False) -> int:
    """Train as `clip-pgs train` says: `[CONFIG] [--nproc N]` and the options of training.

    Returns:
        The exit code, see `clip_pgs.training.stop`.
    """
    try:
        arguments, nproc = _take_nproc(argv)
        if arguments and not arguments[0].startswith("-"):
            arguments = ["--config", *arguments]
        from clip_pgs.training.options import check_values, read_options

        options = read_options(arguments, is_autoencoder=wants_autoencoder)
        check_values(options)
        if wants_autoencoder and options.mae is None:
            raise ValueError(
                f"clip-pgs mae trains a masked autoencoder, and {options.model} is none; give "
                f"--model-config FILE.json with the model_type {MAE_TYPE}"
            )
        _check_launcher()
        # In torchrun's hands this is one of its processes.
        is_worker = "RANK" in os.environ
        processes = Processes(1) if is_worker else Processes.of_environment(nproc)
    except ModuleNotFoundError as error:
        return refuse(f"training needs {error.name}: pip install 'clip-pgs[train]'")
    except ValueError as error:
        return refuse(error)
    if processes.world_size == 1:
        from clip_pgs.training.__main__ import main

        leave(main(arguments) or 0)
    return _Launch().train(arguments, processes)


def evaluate(argv: Sequence[str]) -> int:
    """Evaluate as `clip-pgs test` says; several processes share the data sets.

    Returns:
        The exit code, see `clip_pgs.evaluation`.
    """
    try:
        arguments, nproc = _take_nproc(argv)
        _check_launcher()
        is_alone = not arguments or arguments[0] in ("sets", "report", "-h", "--help")
        processes = Processes(1) if is_alone else Processes.of_environment(nproc, num_nodes="1")
    except ValueError as error:
        return refuse(error)
    if processes.per_node == 1:
        from clip_pgs.evaluation.__main__ import main

        return main(arguments)
    from clip_pgs.evaluation.command import make_parser

    # It ends here with its usage, once, where they are wrong.
    make_parser().parse_args(arguments)
    return _Launch().evaluate(arguments, processes)


@dataclass(frozen=True)
class Processes:
    """How many processes there are, and how they find each other.

    Args:
        per_node: Processes on this machine, >= 1.
        num_nodes: Machines, >= 1.
        node_rank: Number of this machine, from 0.
        address: Where machine 0 is reached, as HOST:PORT; "" for one machine.
        max_restarts: Times that torchrun starts them again.
    """

    per_node: int
    num_nodes: int = 1
    node_rank: int = 0
    address: str = ""
    max_restarts: int = 0

    @classmethod
    def of_environment(cls, nproc: str | None, *, num_nodes: str | None = None) -> Processes:
        """Read the variables above.

        Args:
            nproc: The value of `--nproc`, or None.
            num_nodes: What stands for NNODES, or None.

        Raises:
            ValueError: If one is no whole number in its range, or one is missing.
        """
        variable = os.environ.get
        nodes = _whole_number("NNODES", num_nodes or variable("NNODES") or "1", low=1)
        restarts = _whole_number("MAX_RESTARTS", variable("MAX_RESTARTS") or "0")
        rank, address = 0, ""
        if nodes > 1:
            number, host = variable("NODE_RANK"), variable("MASTER_ADDR")
            if not (number and host):
                raise ValueError(
                    f"NNODES={nodes} needs NODE_RANK, a number from 0, and MASTER_ADDR"
                )
            rank = _whole_number("NODE_RANK", number, high=nodes - 1)
            port = _whole_number("MASTER_PORT", variable("MASTER_PORT") or "29500", 1, 2**16 - 1)
            address = f"{host}:{port}"
        name, text = "--nproc", nproc
        if text is None:
            name, text = "NPROC_PER_NODE", variable("NPROC_PER_NODE") or None
        # Asked last: it may take seconds.
        per_node = _count_gpus() if text is None else _whole_number(name, text, low=1)
        return cls(per_node, nodes, rank, address, restarts)

    @property
    def world_size(self) -> int:
        """Number of processes on all machines."""
        return self.per_node * self.num_nodes

    def torchrun(self, module: str, arguments: Sequence[str]) -> list[str]:
        """Return the command that starts the processes of this machine."""
        command = [sys.executable, "-m", __name__]
        command += ["--nproc-per-node", str(self.per_node)]
        if self.address:
            command += ["--nnodes", str(self.num_nodes), "--rdzv-backend", "c10d"]
            command += ["--rdzv-endpoint", self.address]
            command += ["--rdzv-conf", f"is_host={int(self.node_rank == 0)}"]
        else:
            command += ["--standalone"]
        command += ["--max-restarts", str(self.max_restarts)]
        command += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"]
        # Without `--` torchrun takes --logs, --name and others for abbreviations of its own flags.
        return [*command, "-m", "--", module, *arguments]


def start(command: Sequence[str], **options: Any) -> subprocess.Popen:
    """Start a command that hears of signals by way of this process, and so hears each once.

    In a session of its own, a terminal's Ctrl-C does not reach it. Where Linux can tell it, it gets
    SIGTERM when this process is killed.

    Args:
        command: Program and arguments.
        **options: As `subprocess.Popen` takes them.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)

    def follow() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))

    return subprocess.Popen(command, start_new_session=True, preexec_fn=follow, **options)


def run_quietly(argv: Sequence[str]) -> int:
    """Be torchrun, without its pages where the run itself says why it ended.

    Args:
        argv: torchrun's arguments.

    Returns:
        The exit code: 0, 1 where a process failed, 128 + N after signal N.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import main

    # It warns of every signal that it passes on; what became of it the run says.
    # A machine that ends before another is told as an error of their meeting place.
    for name in ("multiprocessing.api", "agent.server.api", "rendezvous"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    folder = os.environ.get(LAUNCH_FOLDER)
    try:
        main(list(argv))
    except SignalException as error:
        return 128 + int(error.sigval)
    except RendezvousError:
        # Machine 0, which keeps the meeting place, may as well be gone from a run: that says why.
        if folder is None or not any(Path(folder).glob("exit.*")):
            sys.stderr.write(
                "error: the other machines did not come, or are gone; start all NNODES of them, "
                "with the same MASTER_ADDR and MASTER_PORT\n"
            )
        return FAILED
    except ChildFailedError as error:
        if folder is None:
            raise
        rank, failure = error.get_first_failure()
        is_killed = failure.exitcode < 0
        if failure.exitcode not in (PREEMPTED, INTERRUPTED):
            name = failure.signal_name()
            end = f"was ended by {name}" if is_killed else f"ended with code {failure.exitcode}"
            Path(folder, _LOST_NAME).write_text(f"process {rank} {end}", encoding="utf-8")
        if not is_killed and not any(Path(folder).glob("exit.*")):
            raise
        return FAILED
    return 0


@dataclass
class _Launch:
    """Processes started one after the other, and the signals that came for them."""

    process: subprocess.Popen | None = None
    stopped: list[int] = field(default_factory=list)
    is_passed_on: bool = False

    def train(self, arguments: Sequence[str], processes: Processes) -> int:
        with catching(self._note, *_PASSED_ON):
            is_all = not {"--check-only", "--trial"}.isdisjoint(arguments)
            # Bad input is refused before all processes look for it; of several machines the
            # processes tell each other of it, which would wait for one that never starts them.
            if is_all or processes.num_nodes == 1:
                check = [sys.executable, "-m", TRAINING, *arguments, "--check-only"]
                size = {"WORLD_SIZE": str(processes.world_size)}
                status = self._run(check, size, output=None if is_all else subprocess.DEVNULL)
                if status != 0 or is_all:
                    return status
            with tempfile.TemporaryDirectory() as folder:
                variables = {
                    LAUNCH_FOLDER: folder,
                    # Else processes that start again look for the addresses of those before them
                    # (https://github.com/pytorch/pytorch/issues/135712).
                    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                    # Stacks of connections that end with a run.
                    "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
                    **share_cores(processes.per_node),
                }
                status = self._run(processes.torchrun(TRAINING, arguments), variables)
                return self._explained(status, Path(folder)) if status else 0

    def evaluate(self, arguments: Sequence[str], processes: Processes) -> int:
        with catching(self._note, *_PASSED_ON), tempfile.TemporaryDirectory() as folder:
            command = [*arguments, "--exit-code-file", f"{folder}/exit.0000"]
            variables = {LAUNCH_FOLDER: folder, **share_cores(processes.per_node)}
            status = self._run(processes.torchrun(EVALUATION, command), variables)
            return self._explained(status, Path(folder))

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.stopped.append(number)
        self._pass_on()

    def _pass_on(self) -> None:
        """Pass the first signal on; a second would keep torchrun from waiting for the save."""
        if self.stopped and self.process is not None and not self.is_passed_on:
            self.is_passed_on = True
            self.process.send_signal(self.stopped[0])

    def _run(
        self, command: Sequence[str], variables: Mapping[str, str], *, output: int | None = None
    ) -> int:
        """Run a command to its end, and return its exit code; none is started after a signal."""
        if self.stopped:
            return self._code_of_signal()
        environment = {**os.environ, **variables}
        self.process = start(command, env=environment, stdout=output)
        self._pass_on()
        status = self.process.wait()
        return status if status >= 0 else 128 - status

    def _explained(self, status: int, folder: Path) -> int:
        """Return the exit code that the processes left, after its reason on stderr."""
        files, lost = sorted(folder.glob("exit.*")), folder / _LOST_NAME
        text = files[-1].read_text("utf-8") if files else ""
        code, _, reason = text.partition("\n")
        # torchrun tells the others to leave where it lost one.
        is_told = not files or int(code) in (PREEMPTED, INTERRUPTED)
        if lost.is_file() and is_told and not self.stopped:
            sys.stderr.write(f"error: {lost.read_text('utf-8')}\n")
            return FAILED
        if reason.strip():
            prefix = "error: " if int(code) in (BAD_INPUT, FAILED) else ""
            sys.stderr.write(f"{prefix}{one_sentence(reason)}\n")
        if files:
            return int(code)
        if not self.stopped:
            return status
        # It came before there was anything to save, or torchrun did not wait for the save.
        sys.stderr.write(f"stopped by {signal.Signals(self.stopped[0]).name}\n")
        return self._code_of_signal()

    def _code_of_signal(self) -> int:
        return INTERRUPTED if self.stopped[0] == signal.SIGINT else PREEMPTED


def _take_nproc(argv: Sequence[str]) -> tuple[list[str], str | None]:
    """Return the arguments without `--nproc`, and its value or None."""
    rest, nproc = [], None
    words = iter(argv)
    for word in words:
        flag, is_joined, value = word.partition("=")
        if flag == "--nproc":
            nproc = value if is_joined else next(words, "")
        else:
            rest.append(word)
    return rest, nproc


def _check_launcher() -> None:
    """Refuse what no launcher sets, before open_clip and torch read it."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "SLURM_NTASKS"):
        if name in os.environ:
            _whole_number(name, os.environ[name])


def _whole_number(name: str, text: str, low: int = 0, high: int = 10**6) -> int:
    is_number = text.isascii() and text.isdigit() and len(text) < 10
    if not (is_number and low <= int(text) <= high):
        raise ValueError(f"{name} must be a whole number in [{low}, {high}], got {text!r}")
    return int(text)


def _count_gpus() -> int:
    """Return the number of this machine's GPUs, or 1."""
    # Starting torch takes seconds, so that it is asked only where there may be a GPU at all.
    if not (any(map(shutil.which, _GPU_TOOLS)) or any(map(os.path.exists, _GPU_DEVICES))):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


def share_cores(num_processes: int) -> dict[str, str]:
    """Return the variable that shares this machine's cores out, unless the user has set it.

    Without it torchrun gives each of several processes one thread.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return {}
    is_told = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if is_told else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // num_processes))}


if __name__ == "__main__":
    sys.exit(run_program(lambda: run_quietly(sys.argv[1:])))
