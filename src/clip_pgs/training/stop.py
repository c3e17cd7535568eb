"""How a run stops: signals, the vote on them, exit codes with their reasons, and the run's lock.

    0 done, 2 bad input, 85 asked to leave and saved, 130 Ctrl-C and saved, 1 anything else

SIGTERM and SIGUSR1 are Slurm's and the spot market's; SIGHUP comes when a terminal closes; SIGINT
is Ctrl-C, and a second one, later than a launcher's echo of the first, ends the run at once. All
processes vote before each step, so that they leave together; the trainer then saves.

The reason of an end goes to `exit.json` in the run's folder and, where a launcher names a folder of
its own in CLIP_PGS_LAUNCH_DIR, to `exit.N` there, N being torchrun's count of restarts. The first
process that fails writes it; what the others then see of its end does not replace it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, NoReturn

from clip_pgs.common import (
    BAD_INPUT,
    DONE,
    ECHO_SECONDS,
    FAILED,
    INTERRUPTED,
    PREEMPTED,
    OutputError,
    catching,
    explained,
    one_sentence,
    signal_later,
)
from clip_pgs.data.commands import end_processes
from clip_pgs.files import EXIT_NAME, LOCK_NAME

if TYPE_CHECKING:
    from clip_pgs.training.distributed import ProcessGroup

LAUNCH_FOLDER = "CLIP_PGS_LAUNCH_DIR"
# A launch may begin while the one before it still saves: ranks that outlive a killed launcher, say.
LOCK_SECONDS = 60.0

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
# What is raised in a destructor, or in a library's `except:`, is lost.
_AGAIN_SECONDS = 5.0
# Who loses a process stays this long, for its launcher to see which one ended first.
_LOST_SECONDS = 15.0
_POLL_SECONDS = 0.1
_MAX_HOLDER_BYTES = 4096
_LOST_CONNECTION = re.compile(
    r"gloo/|\bNCCL\b|TCPStore|Connection (closed|reset) by|Connection refused|Broken pipe"
)

_logger = logging.getLogger(__name__)


class StopRequest(BaseException):
    """A signal, raised out of a block that may be cut short; no `except Exception` stops it."""


class BadInputError(ValueError):
    """Input that the run found to be impossible when it was about to start."""

    exit_code = BAD_INPUT


class StoppedError(Exception):
    """The end of a run that was asked to leave.

    Args:
        sentence: What asked, and where the run goes on from.
        code: The exit code, also as `exit_code`.
    """

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.exit_code = code


class UnwrittenError(RuntimeError):
    """Something that a run cannot do without, and that cannot be written."""

    exit_code = FAILED


def writing(what: str) -> AbstractContextManager[None]:
    """Explain in a sentence that the block cannot write something."""
    return explained(f"{what} cannot be written", OSError, as_kind=UnwrittenError)


@contextmanager
def as_bad_input() -> Iterator[None]:
    """Explain a ValueError of the block as bad input."""
    try:
        yield
    except ValueError as error:
        raise BadInputError(str(error)) from error


class BadNumbersError(RuntimeError):
    """Weights, losses or gradients that no step makes finite again."""

    exit_code = FAILED


class OtherProcessError(RuntimeError):
    """The end of a process because another one, which says why itself, cannot go on."""

    exit_code = FAILED


def expected_code(error: BaseException) -> int | None:
    """Return the exit code of an end that one sentence explains, None for errors of the program."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    # It names what may not be read or written.
    if isinstance(error, PermissionError) and error.filename is not None:
        return BAD_INPUT
    return getattr(error, "exit_code", None)


def sentence_of(error: BaseException) -> str:
    """Return what happened, as one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if expected_code(error) is not None:
        return one_sentence(error)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class StopSignals:
    """Remembers the first signal that asked this process to leave.

    Attributes:
        code: The exit code that it asks for, 0 while none came.
        name: The signal's name, "" while none came.
    """

    def __init__(self) -> None:
        self.code = 0
        self.name = ""
        self._since = 0.0
        self._process = os.getpid()
        self._parent = os.getppid()
        self._is_interruptible = False
        self._patience = 0.0
        self._reminder: threading.Timer | None = None

    def caught(self) -> AbstractContextManager[None]:
        """Catch signals within the block; a thread other than the main one catches none."""
        return catching(self._note, *_SIGNALS)

    @contextmanager
    def interruptible(self, *, patience: float = 0.0) -> Iterator[None]:
        """Let a signal, one that came before included, end the block with StopRequest.

        Args:
            patience: Seconds that the block has to end by itself after a signal.
        """
        self._is_interruptible, self._patience = True, patience
        try:
            if self.code:
                raise StopRequest(self.name)
            yield
        finally:
            self._is_interruptible = False
            self._cancel_reminder()

    def look_for_launcher(self) -> None:
        """Ask this process to leave where torchrun started it and is gone.

        Nothing else would ever end it, and the next launch of the run would meet it.
        """
        if not self.code and "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != self._parent:
            self.code, self.name = PREEMPTED, "the end of its launcher"

    def wait(self, seconds: float) -> None:
        """Wait for a signal that may be on its way."""
        end = time.monotonic() + seconds
        while not self.code and time.monotonic() < end:
            time.sleep(0.02)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Processes that load data inherit this; they leave when the one they work for does.
        if os.getpid() != self._process:
            return
        now = time.monotonic()
        if not self.code:
            self.code = INTERRUPTED if number == signal.SIGINT else PREEMPTED
            self.name = signal.Signals(number).name
            self._since = now
        elif number == signal.SIGINT and now - self._since > ECHO_SECONDS:
            raise KeyboardInterrupt
        left = self._since + self._patience - now
        if not self._is_interruptible or (left > 0 and self._reminder is not None):
            return
        self._cancel_reminder()
        # Not a second Ctrl-C, whichever signal this is.
        self._reminder = signal_later(signal.SIGTERM, left if left > 0 else _AGAIN_SECONDS)
        if left <= 0:
            raise StopRequest(self.name)

    def _cancel_reminder(self) -> None:
        # Later, it could meet a process that no longer catches signals.
        if self._reminder is not None:
            self._reminder.cancel()
            self._reminder = None


@contextmanager
def signals_by_default() -> Iterator[None]:
    """Let signals that ask to leave end the process within the block, but those it ignores."""
    is_main = threading.current_thread() is threading.main_thread()
    caught = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN] if is_main else []
    earlier = {n: signal.signal(n, signal.SIG_DFL) for n in caught}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class Verdict:
    """What all processes decided together.

    Args:
        stops: Whether they leave.
        has_failed: Whether one of them cannot go on.
        code: The exit code of a stop that a signal asked for.
        num_skipped: Samples that all of them skipped since the last vote.
    """

    stops: bool
    has_failed: bool
    code: int
    num_skipped: int


def stop_vote(
    group: ProcessGroup,
    signals: StopSignals,
    *,
    has_failed: bool = False,
    is_done: bool = False,
    num_skipped: int = 0,
) -> Verdict:
    """Decide together whether the run goes on; each process calls it as often as the others.

    It costs one message of a few numbers between the hosts. The devices are not waited for.

    Args:
        group: The processes.
        signals: Signals to this process.
        has_failed: Whether this process cannot go on.
        is_done: Whether nothing is left to do here that would take long, so that no signal keeps
            the run from it.
        num_skipped: Samples that this process skipped since the last vote.
    """
    signals.look_for_launcher()
    code = signals.code
    preempted, interrupted, failed, undone, skipped = group.sum(
        [code == PREEMPTED, code == INTERRUPTED, has_failed, not is_done, num_skipped]
    )
    is_asked = preempted + interrupted > 0 and undone > 0
    code = PREEMPTED if preempted else INTERRUPTED
    return Verdict(failed > 0 or is_asked, failed > 0, code, skipped)


class ExitReport:
    """Writes why a process ends when its block does; one of all processes is heard.

    Args:
        signals: Signals, by which a launcher tells this process that another one is gone.

    Attributes:
        folder: The run's folder, None while there is none.
        rank: This process, at first as torchrun numbers it.
    """

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals
        self.folder: Path | None = None
        self.rank = int(os.environ.get("RANK", "0"))

    def __enter__(self) -> ExitReport:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is None:
            if self.rank == 0:
                self.write(DONE, "done")
            return
        if isinstance(error, OtherProcessError) or _is_lost_connection(error):
            self._signals.wait(_LOST_SECONDS)
            if self._signals.code and not isinstance(error, OtherProcessError):
                reason = " ".join(str(error).split())
                gone = OtherProcessError(f"another process of the run is gone: {reason}")
                self.write(FAILED, str(gone))
                raise gone from error
        code = expected_code(error)
        self.write(FAILED if code is None else code, sentence_of(error))

    def forget(self) -> None:
        """Remove the reason of an earlier launch; rank 0 calls it while the others wait."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / EXIT_NAME).unlink(missing_ok=True)

    def forget_attempt(self) -> None:
        """Remove what attempts of this launch left; the first process of each machine calls it.

        torchrun counts a restart only on the machine whose process died.
        """
        path = _attempt_file()
        if path is not None:
            for earlier in path.parent.glob("exit.*"):
                with suppress(OSError):
                    earlier.unlink(missing_ok=True)

    def write_error(self, sentence: str) -> None:
        """Write why the process fails, and log it where no other process was first."""
        if self.write(FAILED, sentence):
            _logger.error("%s", sentence)

    def write(self, code: int, reason: str) -> bool:
        """Write a reason where there is none yet; return whether no other was first."""
        entry = {
            "code": code,
            "reason": reason,
            "rank": self.rank,
            "host": socket.gethostname(),
            "process": os.getpid(),
        }
        is_first = True
        if self.folder is not None:
            is_first = _write_new(self.folder / EXIT_NAME, json.dumps(entry) + "\n")
        path = _attempt_file()
        if path is not None:
            speaker = f"rank {self.rank}: " if code in (FAILED, BAD_INPUT) else ""
            is_first = _write_new(path, f"{code}\n{speaker}{reason}\n") and is_first
        return is_first


def _attempt_file() -> Path | None:
    """Return where a launcher looks for the reason of this attempt's end, if one looks."""
    folder = os.environ.get(LAUNCH_FOLDER)
    number = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    return Path(folder, f"exit.{number:04d}") if folder else None


def _is_lost_connection(error: BaseException) -> bool:
    """Return whether an error only says that another process is gone."""
    # Where torch was never imported, the error is not its own.
    if "torch.distributed" in sys.modules:
        from torch.distributed import DistError

        if isinstance(error, DistError):
            return True
    return isinstance(error, RuntimeError) and bool(_LOST_CONNECTION.search(str(error)))


def _write_new(path: Path, text: str) -> bool:
    """Write a file that is not there yet, whole or not at all; return whether none was there."""
    # A run whose disk is full, or whose folder is gone, has a better reason to tell than this.
    with suppress(OSError):
        try:
            file = path.open("x", encoding="utf-8")
        except FileExistsError:
            return False
        try:
            with file:
                file.write(text)
        except OSError:
            path.unlink()
    return True


class RunLock:
    """Holds a run's folder for this process, as long as the block runs.

    The lock ends with the process, however that ends; a file system without locks has none.

    Args:
        folder: The run's folder.

    Raises:
        BadInputError: On entry, if another process holds it for `LOCK_SECONDS`.
        UnwrittenError: On entry, if the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> RunLock:
        with writing("the run's folder"):
            self._file = self._open()
        try:
            self._wait()
        except BaseException:
            self._file.close()
            raise
        self._sign()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def keep(self) -> None:
        """Take the lock again where its file was removed, with or without the folder.

        Raises:
            UnwrittenError: If another process took it meanwhile.
        """
        # Whatever keeps the lock from being made keeps a checkpoint from being written, too.
        with suppress(OSError):
            with suppress(FileNotFoundError):
                now = os.stat(self._folder / LOCK_NAME)
                if os.path.samestat(now, os.fstat(self._file.fileno())):
                    return
            self._file.close()
            self._file = self._open()
            if not take_lock(self._file):
                raise UnwrittenError(
                    f"{self._folder} was removed under this run, and {lock_holder(self._file)} "
                    "trains there now; nothing more of this run is kept"
                )
            self._sign()

    def _open(self) -> IO[bytes]:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / LOCK_NAME
        if path.is_symlink():
            # Signing the lock would empty what a stranger's link leads to.
            path.unlink()
        # Unbuffered: what a full disk refuses is not tried again when the file is closed.
        return path.open("ab+", buffering=0)

    def _wait(self) -> None:
        end, is_told = time.monotonic() + LOCK_SECONDS, False
        while not take_lock(self._file):
            holder = lock_holder(self._file)
            if time.monotonic() > end:
                raise BadInputError(
                    f"{self._folder} is being trained by {holder}; wait for its end, or stop it, "
                    f"or take another --name (if it is gone, remove {self._folder / LOCK_NAME})"
                )
            if not is_told:
                _logger.warning("waiting for %s, which still trains %s", holder, self._folder)
                is_told = True
            time.sleep(_POLL_SECONDS)

    def _sign(self) -> None:
        # Where the disk is full, the lock holds without a name.
        with suppress(OSError):
            self._file.truncate(0)
            holder = {"process": os.getpid(), "host": socket.gethostname()}
            self._file.write(json.dumps(holder).encode())


def take_lock(file: IO[bytes]) -> bool:
    """Take the lock of a run's file, and return whether this process holds it now."""
    try:
        # Not flock, whose locks the data workers of a killed process would go on holding.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        # No locks here.
        return True
    return True


def lock_holder(file: IO[bytes]) -> str:
    """Return who wrote into the file that they hold it."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        file.seek(0)
        entry = json.loads(file.read(_MAX_HOLDER_BYTES))
        return f"process {entry['process']} on {entry['host']}"
    return "another process"


def leave(code: int) -> NoReturn:
    """End this process and those that load data for it, also one that hangs in a read."""
    if threading.current_thread() is threading.main_thread():
        # torch raises an error where one of its workers is killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    children = multiprocessing.active_children()
    end_processes(children)
    if any(child.is_alive() for child in children):
        # In a read that not even this breaks off; Python would wait for it.
        logging.shutdown()
        with suppress(OutputError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
