"""Measure on one GPU what docs/speed.md has no figures of; `gpu_figures.sh` says how to run it.

Each stage is a process with a time limit, the most valuable first, and writes OUT/STAGE.json after
each of its parts. A second call measures the parts that are missing; an OUT that another machine,
another version of the code or other options filled is refused. OUT/log.txt holds what the stages
said, OUT/tables.md the tables. Weights, pictures and tokens are random.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# Products of matrices that repeat their bits ask for it, before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import open_clip
import torch
import torchvision
from gpu_checks import PARTS, Parts, Rows, Sizes, correctness, study
from open_clip.loss import ClipLoss
from open_clip_train.params import parse_args as parse_open_clip
from open_clip_train.train import train_one_epoch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from clip_pgs.common import one_sentence, refuse
from clip_pgs.data.decoding import PixelNormalizer
from clip_pgs.files import read_json_object, write_json, write_text
from clip_pgs.inspection.cost.data import measure_data_speed
from clip_pgs.inspection.cost.step import (
    Benchmark,
    Setup,
    describe_device,
    draw_images,
    known_peak,
    make_rows,
    time_parts,
    time_steps,
)
from clip_pgs.inspection.model_input import OPENAI_MEAN, OPENAI_STD, parse_specs
from clip_pgs.integrations.open_clip import caption_trimmer
from clip_pgs.tables import Cell, Table

# Of one H200: arm, value, bound, and whether it is at most that.
GOALS = (
    ("pgs", "selection_share", 0.01, True),
    ("pgs", "over_random", 1.02, True),
    ("pgs", "time_over_first", 0.52, True),
    ("pgs 0.3, padded", "time_over_first", 0.70, True),
    ("pgs 0.3, packed", "time_over_first", 0.60, True),
    ("plain CLIP", "samples_per_second", 4000, False),
    ("pgs, 77 tokens", "samples_per_second", 7050, False),
    ("pgs", "samples_per_second", 8300, False),
)
# Of the tables of steps: by value, the heading, what it is multiplied with, and its format.
COLUMNS = {
    "title": ("arm", 1, "{}"),
    "text_tokens": ("tokens", 1, "{:.1f}"),
    "selection": ("selection", 1e3, "{:.2f}"),
    "selection_share": ("share", 1, "{:.2%}"),
    "forward": ("forward", 1e3, "{:.1f}"),
    "backward": ("backward", 1e3, "{:.1f}"),
    "step": ("step", 1e3, "{:.1f}"),
    "over_random": ("over random", 1, "{:.3f}"),
    "time_over_first": ("over plain", 1, "{:.3f}"),
    "samples_per_second": ("samples/s", 1, "{:.0f}"),
    "utilization": ("MFU", 1, "{:.1%}"),
    "peak_gib": ("GiB", 1, "{:.2f}"),
}


# ------------------------------------------------------------------------------------------------
# b. How fast is a step?
# ------------------------------------------------------------------------------------------------


def eager(sizes: Sizes) -> Parts:
    """Time steps of every arm, and OpenCLIP's loop beside our own."""
    arms = ("random", "pgs", "pgs, 77 tokens", "pgs 0.3, padded", "pgs 0.3, packed")
    for batch in sizes.batches:
        yield f"eager, batch {batch}", partial(time_arms, sizes, batch, arms)
        yield f"loops, batch {batch}", partial(time_loops, sizes, batch)


def compiled(sizes: Sizes) -> Parts:
    """Time compiled steps, two arms at a time, since each takes long to compile."""
    for batch in sorted(sizes.batches, reverse=True):
        for arms in (("random", "pgs"), ("pgs, 77 tokens", "pgs 0.3, padded")):
            name = f"compiled, batch {batch}: {' and '.join(arms)}"
            yield name, partial(time_arms, sizes, batch, arms, compiles=True)


def make_setup(model: Any, benchmark: Benchmark, arm: str | None, batch: Any) -> Setup:
    """Return a setup by its arm's name: a masking, then what else there is to say."""
    if arm is None:
        return Setup(model, benchmark, *batch)
    masking, _, more = arm.partition(", ")
    packs = {"padded": False, "packed": True}.get(more)
    benchmark = replace(benchmark, trims=more != "77 tokens", pack_tokens=packs)
    masking = "pgs:mask_ratio_min=0.3" if masking == "pgs 0.3" else masking
    setup = Setup(model, benchmark, *batch, *parse_specs([masking]))
    setup.title = arm
    return setup


def time_arms(sizes: Sizes, batch: int, arms: Sequence[str], *, compiles: bool = False) -> Rows:
    """Time a step of plain CLIP and of each arm, in turns."""
    benchmark = sizes.benchmark(batch_size=batch, compiles=compiles)
    model = benchmark.build()
    data = benchmark.draw(model)
    setups = [make_setup(model, benchmark, arm, data) for arm in (None, *arms)]
    rows = time_setups(sizes, model, setups)
    seconds = {row["title"]: row["step"] for row in rows}
    over = seconds.get("random", float("nan"))
    return [row | {"over_random": row["step"] / over if over == over else None} for row in rows]


def time_setups(sizes: Sizes, model: Any, setups: Sequence[Setup]) -> Rows:
    """Return a row per setup, the first of which the others are compared with."""
    torch._dynamo.config.recompile_limit = 64
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    is_half, name = sizes.precision != "fp32", describe_device(torch.device(sizes.device))
    timings = time_steps(setups, optimizer, num_rounds=sizes.rounds)
    peak = known_peak(name, is_half=is_half)
    return make_rows(timings, batch_size=len(setups[0].images), peak=peak)


def time_loops(sizes: Sizes, batch: int) -> Rows:
    """Time OpenCLIP's own loop over a batch on the device, and our steps on the same."""
    benchmark = sizes.benchmark(batch_size=batch)
    model = benchmark.build()
    model.output_dict = True
    images, texts = benchmark.draw(model)
    loader = _Repeated((images, texts.to(images.device)), sizes.rounds)
    args = parse_open_clip(["--batch-size", str(batch), "--precision", sizes.precision])
    # What OpenCLIP's command adds to them.
    args.device, args.rank, args.world_size, args.distributed = sizes.device, 0, 1, False
    args.skip_scheduler, args.distill, args.wandb = True, False, False
    theirs = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda _: None)}
    unfused = torch.optim.AdamW(model.parameters(), lr=1e-6)
    trainer = replace(sizes, small=sizes.model).trainer("--masking", "none", batch=batch)

    def run_theirs() -> None:
        train_one_epoch(model, theirs, ClipLoss(), 0, unfused, None, None, None, args)

    def run_ours() -> None:
        for pair in loader:
            trainer.train_step([pair])

    rows = []
    for title, run in (("OpenCLIP's loop", run_theirs), ("clip-pgs without masking", run_ours)):
        run()
        step = time_parts(images.device, run)[0] / sizes.rounds
        rows.append({"title": title, "step": step, "samples_per_second": batch / step})
    return rows


class _Repeated:
    """Stands in for a loader: one batch again and again."""

    def __init__(self, batch: tuple[Tensor, Tensor], times: int) -> None:
        self.batch, self.num_batches, self.num_samples = batch, times, times * len(batch[0])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([self.batch] * self.num_batches)


# ------------------------------------------------------------------------------------------------
# c. What does each lever gain?
# ------------------------------------------------------------------------------------------------


def levers(sizes: Sizes) -> Parts:
    """Measure with each lever off and on."""

    def one_length(off: Setup, on: Setup) -> None:
        off.texts = caption_trimmer(off.model, shares=(1.0,))(off.captions).to(off.images.device)

    def channels_last(off: Setup, on: Setup) -> None:
        on.images = on.images.to(memory_format=torch.channels_last)

    def graphs(off: Setup, on: Setup) -> None:
        if sizes.backend == "inductor":
            on.runnable = torch.compile(on.model, mode="reduce-overhead")

    step = partial(time_lever, sizes)
    yield "packing", lambda: step("pgs 0.3, padded", "pgs 0.3, packed")
    yield "text buckets", lambda: step(change=one_length, captions="web")
    yield "channels-last", lambda: step(change=channels_last)
    yield "fused AdamW", lambda: time_updates(sizes)
    yield "bytes to the device", lambda: time_copies(sizes)
    yield "JPEG on the GPU", lambda: time_jpegs(sizes)
    yield "CUDA graphs", lambda: step(change=graphs, compiles=True)


def time_lever(
    sizes: Sizes,
    *arms: str,
    change: Callable[[Setup, Setup], None] = lambda off, on: None,
    **changes: Any,
) -> Rows:
    """Time a step with a lever off and on."""
    benchmark = sizes.benchmark(**changes)
    model = benchmark.build()
    data = benchmark.draw(model)
    off, on = (make_setup(model, benchmark, arm, data) for arm in arms or ("pgs", "pgs"))
    change(off, on)
    return [_seconds("step", *(row["step"] for row in time_setups(sizes, model, (off, on))))]


def _seconds(what: str, off: float, on: float) -> dict[str, Any]:
    return {"unit": f"ms per {what}", "off": 1e3 * off, "on": 1e3 * on, "gain": off / on}


def time_updates(sizes: Sizes) -> Rows:
    """Time the optimizer's update, as torch chooses it and fused."""
    model, seconds = sizes.benchmark().build(), []
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    for fused in (None, True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=fused)
        runs = [optimizer.step] * (sizes.rounds + 1)
        seconds.append(min(time_parts(torch.device(sizes.device), *runs)))
    return [_seconds("update", *seconds)]


def time_copies(sizes: Sizes) -> Rows:
    """Time the way of a batch to the device: as floats, and as bytes that are normalized there."""
    device, is_cuda = torch.device(sizes.device), sizes.device == "cuda"
    shape = (sizes.batches[0], 3, 224, 224)
    pixels = torch.randint(256, shape, dtype=torch.uint8, pin_memory=is_cuda)
    floats = torch.zeros(shape, pin_memory=is_cuda)
    finish = PixelNormalizer(OPENAI_MEAN, OPENAI_STD, device=device)
    ways = (
        lambda: floats.to(device, non_blocking=True),
        lambda: finish(pixels.to(device, non_blocking=True)),
    )
    seconds = [min(time_parts(device, *[way] * (sizes.rounds + 1))) for way in ways]
    return [_seconds("batch", *seconds)]


def time_jpegs(sizes: Sizes) -> Rows:
    """Time decoding and cropping on a core, and decoding alone on a core and on the GPU."""
    smooth = draw_images((375, 500), batch_size=8 * sizes.rounds)
    pixels = (128 + 50 * smooth + 5 * torch.randn_like(smooth)).clamp(0, 255).to(torch.uint8)
    files = [encode_jpeg(image, quality=90) for image in pixels]
    speed = measure_data_speed([bytes(file.numpy()) for file in files], num_rounds=3)
    ways = [
        lambda: [decode_jpeg(f) for f in files],
        lambda: decode_jpeg(files, device=sizes.device),
    ]
    device = torch.device(sizes.device)
    alone = [min(time_parts(device, *[way] * 4)) / len(files) for way in ways]
    crops = _seconds("crop on a core, OpenCLIP and ours", 1 / speed["open_clip"], 1 / speed["ours"])
    return [crops, _seconds("picture decoded by torchvision, a core and the GPU", *alone)]


# ------------------------------------------------------------------------------------------------
# Stages, each a process, and their tables
# ------------------------------------------------------------------------------------------------

# Seconds at most, and the parts. What comes first is worth most.
STAGES: dict[str, tuple[float, Callable[[Sizes], Parts]]] = {
    "a": (100, correctness),
    "b-eager": (120, eager),
    "b-compiled": (150, compiled),
    "c": (110, levers),
    "d": (600, study),
}


def run_stage(name: str, sizes: Sizes) -> None:
    """Measure the parts of a stage that its file lacks; the file is whole after each."""
    path, found = sizes.out / f"{name}.json", facts(sizes)
    record = checked_record(path, found) or {"facts": found, "parts": {}, "failed": {}}
    for part, measure in STAGES[name][1](sizes):
        if part in record["parts"]:
            continue
        started = time.perf_counter()
        try:
            record["parts"][part] = measure()
            record["failed"].pop(part, None)
        except Exception as error:
            traceback.print_exc()
            record["failed"][part] = one_sentence(error)[:300]
        # An error would keep what fills the GPU's memory.
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{name}: {part}: {time.perf_counter() - started:.1f} s", flush=True)
        write_json(path, record)
    write_json(path, record | {"done": not record["failed"]})


def read_record(path: Path) -> dict[str, Any] | None:
    """Return what a stage has measured so far.

    Raises:
        ValueError: If the file holds something else.
    """
    if not path.is_file():
        return None
    record = read_json_object(path, what=str(path))
    for key in ("facts", "parts", "failed"):
        if not isinstance(record.get(key), dict):
            raise ValueError(f"{path} holds no figures: it has no {key}; remove it")
    return record


def checked_record(path: Path, found: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a stage has measured so far under the facts of this run, whatever the date.

    Raises:
        ValueError: If other facts hold of it, or the file holds something else.
    """
    record = read_record(path)
    for key, value in found.items() if record else ():
        known = record["facts"].get(key, "unknown")
        if known != value and key != "date":
            raise ValueError(
                f"{path} was measured with {key} {known}, and this is {value}; name another OUT, "
                "or remove the figures in this one"
            )
    return record


def facts(sizes: Sizes) -> dict[str, Any]:
    """Return what must be known to read figures."""
    driver = "none"
    if sizes.device == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("this machine has no CUDA device; --tiny tries everything on a CPU")
        ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": describe_device(torch.device(sizes.device)),
        "driver": driver,
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "open_clip": open_clip.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "model": Path(sizes.model).stem,
        "precision": sizes.precision,
        "code": code_digest(),
        "data": describe_data(sizes.data),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def code_digest() -> str:
    """Return what changes with the code that measures and that is measured."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted([*root.glob("scripts/gpu_*.py"), *root.glob("src/clip_pgs/**/*.py")]):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def describe_data(folder: Path) -> str:
    """Return how much the study has to read, wherever it lies."""
    sizes = [path.stat().st_size for part in PARTS for path in folder.glob(f"{part}/*.tar")]
    return f"{len(sizes)} shards of {sum(sizes)} bytes"


def run_in_child(name: str, sizes: Sizes, seconds: float) -> None:
    """Run a stage in a process of its own and end it, with its own processes, after so long."""
    child = multiprocessing.get_context("fork").Process(target=_child, args=(name, sizes))
    child.start()
    child.join(seconds)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
        child.join()


def _child(name: str, sizes: Sizes) -> None:
    os.setpgid(0, 0)
    with (sizes.out / "log.txt").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    if sizes.backend == "none":
        torch.compile = lambda model: model
    run_stage(name, sizes)


def write_tables(out: Path) -> None:
    """Write what the stages have so far as Markdown."""
    found = {name: record for name in STAGES if (record := read_record(out / f"{name}.json"))}
    text = goals_table(found).markdown()
    for name, record in found.items():
        said = ", ".join(f"{key} {value}" for key, value in record["facts"].items())
        text += f"\n## {name}\n\n{said}\n"
        for part, rows in record["parts"].items():
            text += f"\n### {part}\n\n{to_table(rows).markdown()}"
        for part, reason in record["failed"].items():
            text += f"\n### {part}: not measured\n\n{reason}\n"
    write_text(out / "tables.md", text)


def to_table(rows: Rows) -> Table:
    """Return a part's rows; of those of steps, what docs/speed.md shows."""
    keys = [key for key in (COLUMNS if "title" in rows[0] else rows[0]) if key in rows[0]]
    lines = [[_cell(key, row[key]) for key in keys] for row in rows]
    return Table.of([COLUMNS.get(key, (key,))[0] for key in keys], lines)


def _cell(key: str, value: Any) -> Cell:
    _, factor, form = COLUMNS.get(key, (key, 1, "{:.4g}" if isinstance(value, float) else "{}"))
    return Cell(value, "-" if value is None else form.format(factor * value).replace("%", " %"))


def goals_table(records: dict[str, dict[str, Any]]) -> Table:
    """Return what was asked for beside the best that was measured, and where."""
    parts = [pair for name in records for pair in records[name]["parts"].items()]
    lines = []
    for arm, key, bound, is_most in GOALS:
        found = [
            (row.get(key), part) for part, rows in parts for row in rows if row.get("title") == arm
        ]
        found = sorted((pair for pair in found if pair[0] is not None), reverse=not is_most)
        best, part = found[0] if found else (None, "not measured")
        is_met = best is not None and (best <= bound if is_most else best >= bound)
        verdict = "-" if best is None else "yes" if is_met else "NO"
        goal = f"{'at most' if is_most else 'at least'} {_cell(key, bound).shown}"
        lines.append([f"{arm}: {COLUMNS[key][0]}", goal, _cell(key, best), part, verdict])
    return Table.of(["what", "goal", "best", "where", "met"], lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages that are not done; return 1 where something is still missing, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add, goods = parser.add_argument, Path("data/products")
    add("out", type=Path, metavar="OUT", help="folder of the results")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    add("--minutes", type=float, default=8.0, help="of all together (default: 8)")
    add("--data", type=Path, default=goods, help="for stage d: a folder with train/ and test/*.tar")
    add("--tiny", action="store_true", help="try everything on a CPU, in seconds")
    args = parser.parse_args(argv)
    try:
        sizes = (Sizes.tiny if args.tiny else Sizes)(args.out, args.data)
        args.out.mkdir(parents=True, exist_ok=True)
        # Not here: CUDA, once it has started, does not follow into the stages' processes.
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as child:
            found = child.submit(facts, sizes).result()
        for name in STAGES:
            checked_record(args.out / f"{name}.json", found)
    except (ValueError, RuntimeError, OSError) as error:
        return refuse(error)
    ends, are_done = time.monotonic() + 60 * args.minutes, []
    for name in args.stages:
        path = args.out / f"{name}.json"
        limit = min(STAGES[name][0], ends - time.monotonic())
        if not (read_record(path) or {}).get("done") and limit > 0:
            print(f"{name}: at most {limit:.0f} s", flush=True)
            run_in_child(name, sizes, limit)
            write_tables(args.out)
        are_done.append((read_record(path) or {}).get("done", False))
        print(f"{name}: {'done' if are_done[-1] else 'not complete'}", flush=True)
    more = "" if all(are_done) else "; the same command goes on with what is missing"
    print(f"{args.out}: tables.md, log.txt{more}")
    return 0 if all(are_done) else 1


if __name__ == "__main__":
    sys.exit(main())
