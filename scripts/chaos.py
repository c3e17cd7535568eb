"""Kill a training run hundreds of times and show what that cost: by hand, for an hour.

    python scripts/chaos.py --stops 200                 one process
    python scripts/chaos.py --stops 50 --processes 2    two, by clip-train.sh

On the demo world where it was made (`python -m clip_pgs.data world data/demo`), else on images of
its own. A run that nothing disturbs comes first; the other one has to end as it did, bit for bit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.chaos import Launch, compare, num_steps, run_through_chaos  # noqa: E402
from support.runs import flags, write_shards  # noqa: E402

SAMPLES_PER_STEP = 32


def main() -> int:
    """Run both and print a table; return 0 where nothing was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stops", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--masking", default="pgs")
    options = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    world = ROOT / "data" / "demo" / "train"
    shards = sorted(world.glob("*.tar"))
    if shards:
        train_data = f"{world}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"
    else:
        train_data = write_shards(folder / "train", samples_per_shard=1024)
    argv = flags(
        folder,
        train_data=train_data,
        name=None,
        masking=options.masking,
        # Every launch takes six steps in the mean.
        train_num_samples=SAMPLES_PER_STEP * 50,
        epochs=max(1, options.stops * 6 // 50),
        batch_size=SAMPLES_PER_STEP // options.processes,
        save_every_steps=4,
        save_frequency=10,
        workers=2,
    )
    print(f"in {folder}, on {train_data}", flush=True)
    started = time.monotonic()
    launch = Launch(folder, [*argv, "--name", "expected"], num_processes=options.processes)
    if launch.wait() != 0:
        print(launch.output())
        return 1
    expected = folder / "logs" / "expected"
    steps = num_steps(expected)
    tally = run_through_chaos(
        folder,
        argv,
        name="run",
        seed=options.seed,
        num_stops=options.stops,
        num_processes=options.processes,
    )
    counts = {"num_steps": steps, "samples_per_step": SAMPLES_PER_STEP}
    compare(tally, folder / "logs" / "run", expected, **counts)
    rows = {
        "steps of the run": steps,
        **{f"sent: {name}": count for name, count in sorted(tally.actions.items())},
        **{f"exit code {code}": count for code, count in sorted(tally.codes.items())},
        "seconds to end, median": f"{statistics.median(tally.seconds_to_end):.1f}",
        "seconds to end, longest": f"{max(tally.seconds_to_end):.1f}",
        "no checkpoint that loads": tally.unreadable,
        "samples lost or doubled": tally.lost,
        "tensors that differ at the end": len(tally.differences),
        "minutes": f"{(time.monotonic() - started) / 60:.0f}",
    }
    for name, value in rows.items():
        print(f"{name:32} {value}")
    return int(bool(tally.unreadable or tally.lost or tally.differences))


if __name__ == "__main__":
    sys.exit(main())
