"""Measure what reading shards costs at CC12M's size, on files that take hardly any disk.

    python scripts/simulate_cc12m.py FOLDER

The shards are sparse: a few true pairs at the beginning, then a hole as long as the others would
be. Their indexes are written as `clip_pgs.data.tar` would write them, since making them of 10.9
million members takes long; what making one takes is measured on one shard that has all its members.
A rank is simulated by the worker that reads first, in a process of its own; strace counts what it
asks of the file system.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import random
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import webdataset
from PIL import Image

from clip_pgs.common import refuse
from clip_pgs.data.order import SampleRef, ShardPlan
from clip_pgs.data.preflight import preflight
from clip_pgs.data.shards import write_shard as write_pairs
from clip_pgs.data.tar import _CACHE_VERSION, ShardSource, cache_paths, index_shard, index_shards
from clip_pgs.files import file_state
from clip_pgs.tables import Table

IMAGE_BYTES, CAPTION_BYTES = 40_000, 80
STRIDE = 512 + -(-IMAGE_BYTES // 512) * 512 + 1024  # both headers, both members
GLOBAL_BATCH, WORKERS, BUFFER, FIRST = 4096, 8, 5000, 1000
RANKS = (1, 8, 64)
RATE = 4000  # samples per second and rank, for which calls are counted
CALLS = ("openat", "lseek", "read", "pread64")


# The files


def write_shards(folder: Path, num_shards: int, num_pairs: int) -> list[str]:
    """Write sparse shards with their indexes, and `sizes.json`; those that are there stay.

    Raises:
        ValueError: If the folder holds shards of another number or size, which stay as they are.
    """
    paths = [folder / f"{number:05d}.tar" for number in range(num_shards)]
    size = num_pairs * STRIDE + 1024
    for path in sorted(folder.glob("*.tar")):
        if path not in paths or path.stat().st_size != size:
            raise ValueError(
                f"{path} is none of {num_shards} shards of {num_pairs} pairs; name another folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(image, "jpeg")
    members = {"jpg": image.getvalue().ljust(IMAGE_BYTES, b"\0"), "txt": b"c" * CAPTION_BYTES}
    write_pairs(folder / "true.head", [(f"{number:09d}", members) for number in range(3)])
    head = (folder / "true.head").read_bytes()[: 3 * STRIDE]
    keys = np.array([f"{number:09d}".encode() for number in range(num_pairs)], "S")
    starts = np.arange(num_pairs, dtype=np.int64) * STRIDE
    table = np.zeros((2 * num_pairs, 3), np.int64)
    table[0::2, 1], table[0::2, 2] = starts + 512, IMAGE_BYTES
    table[1::2, 0], table[1::2, 1], table[1::2, 2] = 1, starts + STRIDE - 512, CAPTION_BYTES
    ends = 2 * np.arange(1, num_pairs + 1, dtype=np.int64)
    for path in paths:
        # One that was copied, or left half-written, has lost its index.
        if path.is_file() and len(index_shard(str(path))) == num_pairs:
            continue
        with path.open("wb") as file:
            file.write(head)
            file.truncate(size)
        state = [_CACHE_VERSION, *file_state(path.stat())]
        with cache_paths(str(path))[0].open("wb") as file:
            arrays = {"keys": keys, "ends": ends, "members": table, "suffixes": "jpg/txt"}
            np.savez(file, state=state, **arrays)
    counts = json.dumps({path.name: num_pairs for path in paths})
    (folder / "sizes.json").write_text(counts, encoding="utf-8")
    return [str(path) for path in paths]


def write_whole(path: Path, num_pairs: int) -> None:
    """Write one shard with all its headers, holes in the place of pictures."""
    with path.open("wb") as file:
        for number in range(num_pairs):
            for suffix, size in (("jpg", IMAGE_BYTES), ("txt", CAPTION_BYTES)):
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = size
                file.write(member.tobuf(tarfile.USTAR_FORMAT))
                file.seek(-(-size // 512) * 512, io.SEEK_CUR)
        file.truncate(file.tell() + 1024)


# What is measured, each in a process of its own


def timed(run: Callable[[], object]) -> dict[str, float]:
    """Return seconds by the clock and on the processor, and by how many MB memory grew."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, on_cpu = time.perf_counter(), time.process_time()
    run()
    seconds, processor = time.perf_counter() - started, time.process_time() - on_cpu
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"seconds": seconds, "processor": processor, "mb": grown / 1024}


def look(shards: list[str]) -> dict[str, float]:
    """Run the checks in front of a run."""
    pattern = str(Path(shards[0]).parent / "*.tar")
    names = ("train_data", "val_data", "dataset_type", "caption_key", "dataset_resampled")
    args = SimpleNamespace(**dict(zip(names, (pattern, None, "auto", None, False), strict=True)))
    args.train_num_samples = args.mae = None
    return timed(lambda: preflight(args))


def make_index(shards: list[str], num_pairs: int) -> dict[str, float]:
    """Index a shard that was never seen."""
    path = Path(shards[0]).with_name("whole.tar.new")
    write_whole(path, num_pairs)
    return timed(lambda: index_shard(str(path)))


def read_indexes(shards: list[str]) -> dict[str, float]:
    """Read all indexes that are kept, as a run does at its start."""
    return timed(lambda: index_shards(shards))


def plan_epoch(sizes: list[int]) -> dict[str, float]:
    """Make the plan and find the first sample."""
    return timed(lambda: ShardPlan(sizes, seed=0).sample_at(0, 0))


def worker_positions(ranks: int, first: int, num_batches: int) -> list[range]:
    """Return the positions that the first worker of rank 0 reads, in batches."""
    size = GLOBAL_BATCH // ranks
    starts = [first + step * WORKERS * GLOBAL_BATCH for step in range(num_batches)]
    return [range(start, start + size) for start in starts]


def read_batches(
    shards: list[str], sizes: list[int], *, ranks: int, first: int, num_batches: int
) -> dict[str, float]:
    """Read batches as one worker does; nothing is decoded."""
    plan, source = ShardPlan(sizes, seed=0), ShardSource(shards)

    def run() -> None:
        for positions in worker_positions(ranks, first, num_batches):
            for position in positions:
                source.read(plan.sample_at(0, position))

    return timed(run) | {"open": len(source._open)}


# How well the samples of a shard are parted


def buffered(num_shards: int, num_pairs: int, steps: int) -> list[SampleRef]:
    """Return samples as OpenCLIP's webdataset gives them to 8 ranks: a buffer for each worker."""
    rng, streams, ranks = random.Random(0), [], 8
    for stream in range(ranks * WORKERS):
        own = list(range(stream, num_shards, ranks * WORKERS))
        rng.shuffle(own)
        samples = (SampleRef(shard, n) for shard in own for n in range(num_pairs))
        streams.append(webdataset.shuffle(BUFFER, initial=FIRST, rng=rng)(samples))
    # Each rank takes a batch of its next worker.
    return [
        sample
        for step in range(steps)
        for rank in range(ranks)
        for sample in islice(streams[rank * WORKERS + step % WORKERS], GLOBAL_BATCH // ranks)
    ]


def mixing(order: list[SampleRef]) -> list[float]:
    """Return how far apart neighbors of a shard come, and what is alike in a batch; medians."""
    places = {(ref.shard, ref.number): position for position, ref in enumerate(order)}
    gaps = [
        abs(places[shard, number + 1] - position)
        for (shard, number), position in places.items()
        if (shard, number + 1) in places
    ]
    shards, alike = [], []
    # Buffers have filled by the second half.
    for start in range(len(order) // 2, len(order) - GLOBAL_BATCH + 1, GLOBAL_BATCH):
        counts = Counter(ref.shard for ref in order[start : start + GLOBAL_BATCH])
        shards.append(len(counts))
        alike.append(sum(n * (n - 1) for n in counts.values()) / GLOBAL_BATCH / (GLOBAL_BATCH - 1))
    return [median(gaps), median(shards), median(alike)]


# The tables


def forked(run: Callable[[], dict[str, Any]], *, log: Path | None = None) -> dict[str, Any]:
    """Measure in a fresh copy of this process, so that memory and caches are its own.

    Args:
        run: What returns the measurements.
        log: Where strace, if it is installed, counts the system calls: `calls`.
    """
    ours, theirs = multiprocessing.Pipe()

    def child() -> None:
        theirs.recv()
        theirs.send(run())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    tracer = None
    if log is not None and shutil.which("strace"):
        command = ["strace", "-f", "-c", "-U", "name,calls", "-o", str(log), "-p", str(process.pid)]
        tracer = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        tracer.stderr.readline()  # It says that it is attached.
    ours.send("go")
    found = ours.recv()
    process.join()
    if tracer is not None:
        tracer.wait()
        lines = re.findall(r"^\s*(\w+)\s+(\d+)\s*$", log.read_text("utf-8"), re.M)
        found["calls"] = {name: int(number) for name, number in lines}
    return found


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="for the shards; 0.8 GB of disk")
    add("--shards", type=int, default=2176)
    add("--pairs", type=int, default=5000)
    add("--samples", type=int, default=65536, help="that a worker reads (default: 65536)")
    add("--steps", type=int, default=640, help="that mixing looks at (default: 640)")
    args = parser.parse_args()
    try:
        shards = write_shards(args.folder, args.shards, args.pairs)
    except (ValueError, OSError) as error:
        sys.exit(refuse(error))
    sizes = [args.pairs] * args.shards

    def row(what: str, found: dict[str, float]) -> list[Any]:
        return [what, f"{found['seconds']:.3g}", f"{found['processor']:.3g}", round(found["mb"])]

    size = cache_paths(shards[0])[0].stat().st_size
    rows = [
        row("checks in front of a run", forked(lambda: look(shards))),
        row("index a shard that was never seen", forked(lambda: make_index(shards, args.pairs))),
        row("read all kept indexes", forked(lambda: read_indexes(shards))),
        row("plan an epoch, find its first sample", forked(lambda: plan_epoch(sizes))),
    ]
    middle = random.Random(0).randrange(sum(sizes) // GLOBAL_BATCH) * GLOBAL_BATCH
    reading = []
    for ranks in RANKS:
        batch = GLOBAL_BATCH // ranks
        for what, first in (("start", 0), (f"resume at sample {middle}", middle)):
            read = partial(read_batches, shards, sizes, ranks=ranks, first=first, num_batches=1)
            rows.append(row(f"{what}, {ranks} ranks: a batch of {batch}", forked(read)))
        number = max(1, args.samples // batch)
        read = partial(read_batches, shards, sizes, ranks=ranks, first=0, num_batches=number)
        found = forked(read)
        calls = forked(read, log=args.folder / "calls.txt").get("calls", {})
        rates = [f"{calls.get(name, 0) / number / batch * RATE:.0f}" for name in CALLS]
        speed = round(number * batch / found["processor"])
        reading.append([ranks, number * batch, *rates, found["open"], round(found["mb"]), speed])
    plan, length, total = ShardPlan(sizes, seed=0), args.steps * GLOBAL_BATCH, sum(sizes)
    streamed = buffered(args.shards, args.pairs, args.steps)
    perfect = [
        total * (1 - 0.5**0.5),
        args.shards * (1 - (1 - 1 / args.shards) ** GLOBAL_BATCH),
        (args.pairs - 1) / (total - 1),
    ]
    mixed = [
        ("clip-pgs", mixing([plan.sample_at(0, position) for position in range(length)])),
        (f"webdataset, buffers of {BUFFER}, 8 ranks x {WORKERS} workers", mixing(streamed)),
        ("perfect shuffle (computed)", perfect),
    ]
    columns = ("samples", *(f"{name}/s" for name in CALLS), "open files", "MB", "samples/s")
    near, batches = "samples between neighbors", f"shards in a batch of {GLOBAL_BATCH}"
    alike = [[name, f"{a:.0f}", f"{b:.0f}", f"{c:.2%}"] for name, (a, b, c) in mixed]
    print(f"{args.shards} shards of {args.pairs} pairs, {size / 1e3:.0f} kB of index each")
    for table in (
        Table.of(["what", "seconds", "processor", "MB"], rows),
        Table.of(["ranks", *columns], reading),
        Table.of(["order", near, batches, "pairs of one shard"], alike),
    ):
        print("\n" + table.markdown(), end="")


if __name__ == "__main__":
    main()
