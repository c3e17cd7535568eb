"""How a process leaves, whatever its data workers are doing."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from typing import NoReturn

_KILL_SECONDS = 2.0


def leave(code: int) -> NoReturn:
    """End this process and those that load data for it, also one that hangs in a read."""
    if threading.current_thread() is threading.main_thread():
        # torch raises an error where one of its workers is killed.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    children = multiprocessing.active_children()
    for child in children:
        # Asked to leave, it would first finish what it reads.
        child.kill()
    for child in children:
        child.join(_KILL_SECONDS)
    if any(child.is_alive() for child in children):
        # In a read that not even this breaks off; Python would wait for it.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
