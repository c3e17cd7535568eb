"""Start torchrun as a user would."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


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
