"""Kill a process while it saves checkpoints, again and again, and see what is left each time.

    python scripts/chaos_checkpoints.py --kills 200

A child saves without a pause, as a run would that did nothing else; SIGKILL comes at a random
moment; the next child goes on from what is there. After each kill `latest` must name a file that
plain torch opens, whose bytes have the listed checksum, whose every number is that of its step,
and which is not older than what the child had been told is on the disk.
"""

import argparse
import hashlib
import mmap
import os
import random
import signal
import struct
import sys
import tempfile
import time
from pathlib import Path

import torch

from clip_pgs.checkpoint_reading import load_checkpoint
from clip_pgs.common import refuse
from clip_pgs.training.checkpoint import CheckpointStore, find_latest

STEPS_PER_EPOCH = 5
LONGEST_WAIT = 0.12


def save_forever(folder: Path, confirmed: mmap.mmap, *, num_floats: int) -> None:
    """Save step after step, and state each step once it is on the disk."""
    latest = find_latest(folder)
    step = 0 if latest is None else load_checkpoint(latest)["step"]
    store = CheckpointStore(folder, keep_last=2, delete_previous=True)
    while True:
        step += 1
        is_epoch = step % STEPS_PER_EPOCH == 0
        weights = torch.full((num_floats,), float(step))
        content = {
            "epoch": step // STEPS_PER_EPOCH,
            "step": step,
            "state_dict": {"weight": weights},
            "optimizer": {"state": {0: {"exp_avg": weights, "exp_avg_sq": weights}}},
        }
        epoch_names = (f"epoch_{step // STEPS_PER_EPOCH}.pt", "epoch_latest.pt")
        store.save(content, *(epoch_names if is_epoch else (f"step_{step}.pt",)))
        if store.wait():
            confirmed[:8] = struct.pack("q", step)


def kill_once(folder: Path, confirmed: mmap.mmap, *, num_floats: int, wait: float) -> None:
    """Start a child, wait until it saves, and kill it `wait` seconds later."""
    before = confirmed[:8]
    child = os.fork()
    if child == 0:
        try:
            save_forever(folder, confirmed, num_floats=num_floats)
        finally:
            os._exit(1)
    while confirmed[:8] == before:
        time.sleep(0.001)
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            sys.exit("the child ended by itself")
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def find_fault(folder: Path, *, confirmed: int) -> str | None:
    """Return what is wrong with `latest`, by means of plain torch and hashlib alone."""
    path = folder / (folder / "latest").read_text("utf-8").strip()
    try:
        content = torch.load(path, weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        return f"{path.name} does not load: {error}"
    step = content["step"]
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if f"{digest}  {path.name}" not in (folder / "SHA256SUMS").read_text("utf-8").splitlines():
        return f"the checksum of {path.name} is not listed"
    moments = content["optimizer"]["state"][0]
    for tensor in (content["state_dict"]["weight"], moments["exp_avg"], moments["exp_avg_sq"]):
        if not bool((tensor == step).all()):
            return f"{path.name} holds numbers of another step"
    if step < confirmed:
        return f"{path.name} is older than step {confirmed}, which was on the disk"
    return None


def main() -> int:
    """Run the kills; return 0 if none left a fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--megabytes", type=float, default=3.0, help="size of a checkpoint")
    parser.add_argument("--folder", type=Path, help="where; a temporary folder by default")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.folder is not None and args.folder.is_dir() and any(args.folder.iterdir()):
        # Its checkpoints would be counted as those of this trial.
        return refuse(f"--folder must be new or empty, got {args.folder}")
    # A child of fork cannot use its parent's threads.
    torch.set_num_threads(1)
    delays = random.Random(args.seed)
    confirmed = mmap.mmap(-1, 8)
    faults, in_mid_write = [], 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        for number in range(args.kills):
            num_floats = int(args.megabytes * 1e6 / 12)
            wait = delays.uniform(0, LONGEST_WAIT)
            kill_once(folder, confirmed, num_floats=num_floats, wait=wait)
            in_mid_write += any(folder.glob(".*.unfinished"))
            (step,) = struct.unpack("q", confirmed[:8])
            fault = find_fault(folder, confirmed=step)
            if fault is not None:
                faults.append(f"kill {number}: {fault}")
        seconds = time.monotonic() - started
    print(
        f"{args.kills} kills in {seconds:.0f} s, {in_mid_write} of them in the middle of a write, "
        f"{step} checkpoints saved: {len(faults)} unreadable or outdated"
    )
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
