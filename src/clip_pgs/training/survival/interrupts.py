"""Signals that ask a run to save and leave.

SIGTERM and SIGUSR1 are Slurm's and the spot market's; SIGHUP comes when a terminal closes; SIGINT
is Ctrl-C, and a second one, later than a launcher's echo of the first, ends the run at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Exit codes.
PREEMPTED, INTERRUPTED = 85, 130

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_ECHO_SECONDS = 2.0
# What is raised in a destructor, or in a library's `except:`, is lost.
_AGAIN_SECONDS = 5.0


class AskedToLeave(BaseException):
    """Raised out of a block that may be broken off; no `except Exception` on its way stops it."""


class Interrupts:
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
        self._is_breakable = False
        self._patience = 0.0
        self._reminder: threading.Timer | None = None
        self._is_reminded = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch signals within the block; a thread other than the main one catches none."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in _SIGNALS}
        for number, handler in before.items():
            # A signal that whoever started the run wants ignored (nohup) stays ignored.
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def breakable(self, *, patience: float = 0.0) -> Iterator[None]:
        """Let a signal, one that came before included, end the block with AskedToLeave.

        Args:
            patience: Seconds that the block has to end by itself after a signal.
        """
        self._is_breakable, self._patience = True, patience
        try:
            if self.code:
                raise AskedToLeave(self.name)
            yield
        finally:
            self._is_breakable = False
            self._forget_reminder()

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
        if self._is_reminded:
            # Not a second Ctrl-C.
            self._is_reminded = False
        elif not self.code:
            self.code = INTERRUPTED if number == signal.SIGINT else PREEMPTED
            self.name = signal.Signals(number).name
            self._since = now
        elif number == signal.SIGINT and now - self._since > _ECHO_SECONDS:
            raise KeyboardInterrupt
        if not self._is_breakable:
            return
        left = self._since + self._patience - now
        if left > 0 and self._reminder is not None:
            return
        self._forget_reminder()
        wait = left if left > 0 else _AGAIN_SECONDS
        self._reminder = threading.Timer(wait, self._remind, (threading.get_ident(), number))
        self._reminder.daemon = True
        self._reminder.start()
        if left <= 0:
            raise AskedToLeave(self.name)

    def _forget_reminder(self) -> None:
        # Later, it could meet a process that no longer catches signals.
        if self._reminder is not None:
            self._reminder.cancel()
            self._reminder = None

    def _remind(self, thread: int, number: int) -> None:
        """Send a thread the signal that it had, when its time is up."""
        self._is_reminded = True
        signal.pthread_kill(thread, number)
