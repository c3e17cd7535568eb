"""How a run ends: its exit codes, and the reason that it leaves for those who started it.

    0 done, 2 bad input, 85 asked to leave and saved, 130 Ctrl-C and saved, 1 anything else

The reason goes to `exit.json` in the run's folder and, where a launcher names a folder of its own
in CLIP_PGS_LAUNCH_DIR, to `exit.N` there, N being torchrun's count of restarts. The first process
that fails writes it; what the others then see of its end does not replace it.
"""

from __future__ import annotations

import json
import os
import re
import socket
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from torch.distributed import DistError

from clip_pgs.data.skips import StalledDataError, UnusableDataError
from clip_pgs.training.survival.interrupts import INTERRUPTED, Interrupts

DONE, FAILED, BAD_INPUT = 0, 1, 2
EXIT_NAME = "exit.json"
LAUNCH_FOLDER = "CLIP_PGS_LAUNCH_DIR"

# Who loses a process stays this long, for its launcher to see which one ended first.
_PATIENCE_SECONDS = 15.0
_LOST_CONNECTION = re.compile(
    r"gloo/|\bNCCL\b|TCPStore|Connection (closed|reset) by|Connection refused|Broken pipe"
)


class BadInputError(ValueError):
    """Input that the run found to be impossible when it was about to start."""


class StoppedError(Exception):
    """The end of a run that was asked to leave.

    Args:
        sentence: What asked, and where the run goes on from.
        code: The exit code.
    """

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


class UnwrittenError(RuntimeError):
    """Something that a run cannot do without, and that cannot be written."""


def unwritten_folder(error: OSError) -> UnwrittenError:
    """Return what to raise where a run's folder cannot be written."""
    return UnwrittenError(f"the run's folder cannot be written: {error}")


class BadNumbersError(RuntimeError):
    """Weights, losses or gradients that no step makes finite again."""


class OtherProcessError(RuntimeError):
    """The end of a process because another one, which says why itself, cannot go on."""


# Ends that one sentence explains, with their exit codes; others are errors of the program.
_EXPECTED: tuple[tuple[type[BaseException], int], ...] = (
    (BadInputError, BAD_INPUT),
    (UnusableDataError, BAD_INPUT),
    (StalledDataError, FAILED),
    (BadNumbersError, FAILED),
    (UnwrittenError, FAILED),
    (OtherProcessError, FAILED),
    (KeyboardInterrupt, INTERRUPTED),
)

EXPECTED: tuple[type[BaseException], ...] = (StoppedError, *(kind for kind, _ in _EXPECTED))


def expected_code(error: BaseException) -> int | None:
    """Return the exit code of an end that one sentence explains, None for any other."""
    if isinstance(error, StoppedError):
        return error.code
    return next((code for kind, code in _EXPECTED if isinstance(error, kind)), None)


def sentence_of(error: BaseException) -> str:
    """Return what happened, as one line."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    text = _line(error)
    if expected_code(error) is not None:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())


def is_lost_connection(error: BaseException) -> bool:
    """Return whether an error only says that another process is gone."""
    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_LOST_CONNECTION.search(str(error)))


class ExitReport:
    """Writes why a process ends when its block does; one of all processes is heard.

    Args:
        interrupts: Signals, by which a launcher tells this process that another one is gone.
        rank: This process.

    Attributes:
        folder: The run's folder, None while there is none.
        rank: As above.
    """

    def __init__(self, interrupts: Interrupts, *, rank: int = 0) -> None:
        self._interrupts = interrupts
        self.folder: Path | None = None
        self.rank = rank

    def __enter__(self) -> ExitReport:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            if self.rank == 0:
                self.write(DONE, "done")
            return
        if isinstance(error, OtherProcessError) or is_lost_connection(error):
            self._interrupts.wait(_PATIENCE_SECONDS)
            if self._interrupts.code and not isinstance(error, OtherProcessError):
                gone = OtherProcessError(f"another process of the run is gone: {_line(error)}")
                self.write(FAILED, str(gone))
                raise gone from error
        code = expected_code(error)
        self.write(FAILED if code is None else code, sentence_of(error))

    def forget(self) -> None:
        """Remove the reason of an earlier launch; rank 0 calls it while the others wait."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / EXIT_NAME).unlink(missing_ok=True)

    def write(self, code: int, reason: str) -> bool:
        """Write a reason where there is none yet; return whether this one is it."""
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
        path = launch_file("exit")
        if path is not None:
            speaker = f"rank {self.rank}: " if code in (FAILED, BAD_INPUT) else ""
            is_first = _write_new(path, f"{code}\n{speaker}{reason}\n") and is_first
        return is_first


def launch_file(name: str) -> Path | None:
    """Return the path of this attempt's `name` in the launcher's folder, None without one."""
    folder = os.environ.get(LAUNCH_FOLDER)
    if not folder:
        return None
    return Path(folder) / f"{name}.{int(os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')):04d}"


def _write_new(path: Path, text: str) -> bool:
    # A run whose disk is full, or whose folder is gone, has a better reason to tell than this.
    with suppress(OSError), path.open("x", encoding="utf-8") as file:
        file.write(text)
        return True
    return False
