"""Processes that a test looks for."""

import subprocess
import time

_END_SECONDS = 2.0


def is_running(path):
    """Return whether a process whose number a file holds runs on, after a moment to end."""
    numbers = ",".join(path.read_text().split())
    end = time.monotonic() + _END_SECONDS
    while time.monotonic() < end:
        command = ["ps", "-o", "stat=", "-p", numbers]
        states = subprocess.run(command, capture_output=True, text=True, check=False).stdout
        if all(state.startswith("Z") for state in states.split()):
            return False
        time.sleep(0.1)
    return True
