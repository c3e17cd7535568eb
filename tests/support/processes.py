"""Start torchrun as a user would, and look for processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
_END_SECONDS = 2.0


def torchrun(*arguments, num_processes=2, launcher=("--standalone",), wait=True):
    """Start torchrun on the CPU; return (exit code, standard error), or the process itself."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launcher,
        f"--nproc-per-node={num_processes}",
        *map(str, arguments),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    if not wait:
        return process
    _, error = process.communicate(timeout=300)
    return process.returncode, error


def run_suspended(script, *, seconds):
    """Run Python code that prints "begun", and suspend it then for so long.

    Returns:
        Its exit code, standard output and standard error.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    said, error = process.communicate(timeout=60)
    return process.returncode, said, error


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
