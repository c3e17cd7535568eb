"""Kill a training run hundreds of times and show what that cost: by hand, for an hour.

    python scripts/chaos.py --stops 200                 one process
    python scripts/chaos.py --stops 50 --processes 2    two, by clip-train.sh

It trains on images of its own, of which one in fifty is broken. A run that nothing disturbs comes
first; the other one has to end as it did, bit for bit. Exit code 0 says that nothing was lost.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

from clip_pgs.data.shards import write_shard
from clip_pgs.data.tar import read_shard

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.chaos import Launch, Tally, compare, num_steps, run_through_chaos  # noqa: E402
from support.runs import flags, write_shards  # noqa: E402

SAMPLES_PER_STEP = 32
STEPS_PER_EPOCH = 50
# One process ends by itself or is killed; of several, the launcher says 1 when one was killed, and
# 137 when torchrun was. A signal can come before clip-train.sh has begun.
RIGHT_CODES = {1: {0, 85, -9}, 2: {0, 1, 85, 137, -9, -10, -15}}


def break_images(folder: Path, *, every: int) -> int:
    """Overwrite each `every`-th image of the shards with what is none; return how many."""
    numbers = count(1)
    for path in sorted(folder.glob("*.tar")):
        samples = []
        for pair, number in zip(read_shard(str(path)), numbers, strict=False):
            image = b"no image" if number % every == 0 else pair.image
            samples.append((pair.key, {"png": image, "txt": pair.captions[0]}))
        write_shard(path, samples)
    return (next(numbers) - 1) // every


def report(line: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def table(tally: Tally, *, steps: int, num_broken: int, seconds: float) -> dict[str, object]:
    """Return what a trial went through, by name."""
    return {
        "steps of the run": steps,
        **{f"sent: {name}": count for name, count in sorted(tally.actions.items())},
        **{f"exit code {code}": count for code, count in sorted(tally.codes.items())},
        "seconds to end, median": f"{statistics.median(tally.seconds_to_end):.1f}",
        "seconds to end, longest": f"{max(tally.seconds_to_end):.1f}",
        "broken images in the data": num_broken,
        "bad samples skipped": tally.bad_samples,
        "no checkpoint that loads": tally.unreadable,
        "samples lost or doubled": tally.lost,
        "tensors that differ at the end": len(tally.differences),
        "minutes": f"{seconds / 60:.0f}",
    }


def main() -> int:
    """Run both and print a table; return 0 where nothing was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stops", type=int, default=200)
    parser.add_argument("--processes", type=int, choices=sorted(RIGHT_CODES), default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--masking", default="pgs")
    options = parser.parse_args()

    started = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    report(f"in {folder}")
    train_data = write_shards(
        folder / "train", samples_per_shard=SAMPLES_PER_STEP * STEPS_PER_EPOCH // 2
    )
    num_broken = break_images(folder / "train", every=50)
    argv = flags(
        folder,
        train_data=train_data,
        name=None,
        masking=options.masking,
        # Every launch takes six steps in the mean.
        epochs=max(1, options.stops * 6 // STEPS_PER_EPOCH),
        batch_size=SAMPLES_PER_STEP // options.processes,
        save_every_steps=4,
        save_frequency=10,
        workers=2,
    )
    launch = Launch(folder, [*argv, "--name", "expected"], num_processes=options.processes)
    if launch.wait() != 0:
        report(f"the run that nothing disturbs failed:\n{launch.output()}")
        return 1
    expected = folder / "logs" / "expected"
    steps = num_steps(expected)
    report(f"{steps} steps undisturbed")
    tally = run_through_chaos(
        folder,
        argv,
        name="run",
        seed=options.seed,
        num_stops=options.stops,
        num_processes=options.processes,
        report=report,
    )
    counts = {"num_steps": steps, "samples_per_step": SAMPLES_PER_STEP}
    compare(tally, folder / "logs" / "run", expected, **counts)
    seconds = time.monotonic() - started
    for name, value in table(tally, steps=steps, num_broken=num_broken, seconds=seconds).items():
        print(f"{name:32} {value}")
    odd = set(tally.codes) - RIGHT_CODES[options.processes]
    if odd or tally.unreadable or tally.lost or tally.differences:
        print(f"FAILED, odd exit codes {sorted(odd)}; everything is kept in {folder}")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
