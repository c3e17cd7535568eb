"""What a training step costs with each strategy, beside plain CLIP: the command `cost`.

What is run: models of random weights on random data, one plain and one for each strategy, which
share their weights. What it takes: in every round each takes a step, so that what slows the machine
down for a while meets all of them and the ratios of a round stay right. What is told: a row for
each, as a table, a plot and a file.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from itertools import pairwise, product
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss
from open_clip.model import CLIP, CustomTextCLIP
from open_clip_train.precision import get_autocast
from timm.layers import to_2tuple
from torch import Tensor, nn
from torch._dynamo.utils import counters
from tqdm import tqdm

from clip_pgs.common import find_config
from clip_pgs.files import check_writable, write_bytes, write_json
from clip_pgs.inspection.model_input import StrategySpec, parse_specs
from clip_pgs.integrations.apply import masking_or_none
from clip_pgs.integrations.open_clip import (
    CaptionGroups,
    CaptionTrimmer,
    allow_short_text,
    apply_masking,
    caption_trimmer,
    set_masking_progress,
)
from clip_pgs.integrations.open_clip.compat import no_foreign_code
from clip_pgs.integrations.open_clip.flops import count_pass
from clip_pgs.integrations.open_clip.model_config import (
    largest_memory,
    register_model_config,
    usable_device,
)
from clip_pgs.integrations.open_clip.text import GROUP_SHARES
from clip_pgs.masking.strategy import MASK_RATIO
from clip_pgs.tables import Cell, Table, counted

PLAIN_TITLE = "plain CLIP"
TICK = 1e-6  # seconds; some machines' processor time stands still for longer than a tiny part takes
# Of a table: by heading, the name of a value, what it is multiplied with, and its format.
Columns = dict[str, tuple[str, float, str]]
PARTS = ("selection", "forward", "backward", "update")
# By device: what runs in minutes there.
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"model": "ViT-S-16", "batch_size": 16, "precision": "fp32", "steps": 5},
    "cuda": {"model": "ViT-B-16", "batch_size": 256, "precision": "amp_bf16", "steps": 20},
}
# Mean and standard deviation of the tokens of a caption, start and end included. Flickr8k's are
# measured (3,000 captions); alt-text has a long tail, so that one caption in a few hundred fills
# the context.
LENGTHS = {"flickr8k": (14.1, 3.9), "web": (27.0, 20.0)}

_SHORTEST = 3  # caption
_COPIES = 4  # of the images, which any step takes at least
# Longest captions as shares of the context. The second length makes the compiler take any; the
# whole context alone is not cut.
_WARM_UP, _LATER = (1.0, 0.2, 0.4), (0.25, 0.5, 0.3, 0.6, 0.8, 1.0)
_FEW = 2  # captions that stand for a group, since each of one length costs the same
_SOME = 64  # images that stand for a batch, of which each may keep another number of patches
# Tensor cores without sparsity in TFLOP/s, at 16 bits and at TF32, by what the driver calls the
# device; the first that fits. NVIDIA's data sheets give the sparse rate, which is twice as high.
_TENSOR_CORES = (
    ("H200 NVL", 835.5, 417.5, "NVIDIA H200 data sheet (NVL)"),
    ("H200", 989.5, 494.5, "NVIDIA H200 data sheet (SXM)"),
    ("H100 NVL", 835.5, 417.5, "NVIDIA H100 data sheet (NVL)"),
    ("H100 PCIe", 756.0, 378.0, "NVIDIA H100 data sheet (PCIe)"),
    ("H100", 989.5, 494.5, "NVIDIA H100 data sheet (SXM)"),
    ("A100", 312.0, 156.0, "NVIDIA A100 data sheet"),
)
_PEAK_SIDE, _PEAK_REPEATS = 1536, 5
_ROOM = 1.25  # between the outermost points of the plot and its frame


# ------------------------------------------------------------------------------------------------
# What is run
# ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Benchmark:
    """What is run, on what, where and how; the command's options of these names.

    Args:
        model: What open_clip calls it, or a model config (JSON).
        image_size: In pixels; None is the model's.
        device: Of weights and images.
        precision: As OpenCLIP names it.
        batch_size: Of a step.
        captions: Whose lengths they have, one of `LENGTHS`.
        seed: Of weights and data.
        progress: Share of training that strategies are told.
        trims: Whether masked models get trimmed captions.
        pack_tokens: As `apply_masking` takes it.
        compiles: Whether models go through `torch.compile`.
        mask_ratio: For strategies that take one.
    """

    model: str
    image_size: int | None
    device: torch.device
    precision: str
    batch_size: int
    captions: str = "flickr8k"
    seed: int = 0
    progress: float = 0.0
    trims: bool = True
    pack_tokens: bool | None = None
    compiles: bool = False
    mask_ratio: float | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Benchmark:
        """Take the options that a command has."""
        names = [field.name for field in fields(cls) if hasattr(args, field.name)]
        return cls(**{name: getattr(args, name) for name in names})

    def build(self) -> CLIP | CustomTextCLIP:
        """Build the model in float32 with random weights; OpenCLIP's trainer makes it so too.

        Raises:
            ValueError: If there is no such model, or it has no plain pair of towers.
        """
        name = find_config(self.model, "models")
        if name.endswith(".json"):
            name = register_model_config(Path(name))
        if name not in open_clip.list_models():
            raise ValueError(f"{self.model!r} is neither a model config nor an open_clip model")
        torch.manual_seed(self.seed)
        with no_foreign_code():
            model: nn.Module = open_clip.create_model(
                name, device=self.device, force_image_size=self.image_size, load_weights=False
            )
        if type(model) not in (CLIP, CustomTextCLIP):
            kind = type(model).__name__
            raise ValueError(f"the benchmark runs plain pairs of towers, and {name} is a {kind}")
        return model

    def draw(self, model: CLIP | CustomTextCLIP) -> tuple[Tensor, Tensor]:
        """Draw a batch that the model takes.

        Returns:
            Images (B, 3, H, W) on the device, and padded token ids (B, T) on the CPU.
        """
        size = to_2tuple(model.visual.image_size)
        images = draw_images(size, batch_size=self.batch_size, seed=self.seed)
        lengths = {"context_length": model.context_length, "vocab_size": model.vocab_size}
        texts = draw_captions(self.captions, batch_size=self.batch_size, seed=self.seed, **lengths)
        return images.to(self.device), texts

    def autocast(self) -> AbstractContextManager:
        """Return the context of a forward pass, as OpenCLIP's trainer chooses it."""
        return get_autocast(self.precision, device_type=self.device.type)()


def draw_captions(
    kind: str, *, batch_size: int, context_length: int, vocab_size: int, seed: int = 0
) -> Tensor:
    """Draw captions of log-normal lengths, each ending with the highest token id.

    Args:
        kind: One of `LENGTHS`.
        batch_size: Captions.
        context_length: Columns; longer captions are cut there.
        vocab_size: Token ids are below it.
        seed: Same seed, same captions.

    Returns:
        Token ids of shape (B, context length), zeros behind a caption's end.
    """
    mean, deviation = LENGTHS[kind]
    variance = math.log1p((deviation / mean) ** 2)
    generator = torch.Generator().manual_seed(seed)
    normal_B = torch.randn(batch_size, generator=generator)
    lengths_B = (math.log(mean) - variance / 2 + math.sqrt(variance) * normal_B).exp().round()
    last_B = lengths_B.clamp(min(_SHORTEST, context_length), context_length).long() - 1
    ids_BT = torch.randint(
        1, vocab_size - 1, (batch_size, context_length), generator=generator, dtype=torch.int64
    )
    position_T = torch.arange(context_length)
    ids_BT[position_T > last_B[:, None]] = 0
    return ids_BT.scatter(1, last_B[:, None], vocab_size - 1)


def draw_images(image_size: tuple[int, int], *, batch_size: int, seed: int = 0) -> Tensor:
    """Draw smooth random images of about mean 0 and deviation 1, shape (B, 3, H, W).

    Raises:
        ValueError: If a few copies of them fill the memory.
    """
    num_bytes = 4 * 3 * batch_size * image_size[0] * image_size[1]
    if num_bytes > largest_memory() / _COPIES:
        raise ValueError(
            f"a step of {counted(batch_size, 'image')} of {image_size[0]} x {image_size[1]} pixels "
            f"takes more than {_COPIES * num_bytes / 2**30:.0f} GiB, which this machine has not"
        )
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(
        batch_size, 3, *(max(2, side // 16) for side in image_size), generator=generator
    )
    return nn.functional.interpolate(coarse, size=image_size, mode="bilinear", align_corners=False)


class Setup:
    """One model of a comparison, which shares its weights with the others.

    Args:
        model: A plain model; a copy of it is made that owns everything but the weights.
        benchmark: How all setups are run.
        images: Shape (B, 3, H, W), on the device.
        captions: Padded token ids (B, T), on the CPU.
        spec: The strategy; None leaves the model and its captions as OpenCLIP has them.

    Attributes:
        title: What it is called.
        images: As given.
        captions: As given.
        autocast: Context of a forward pass.
        model: The copy.
        runnable: The copy as it is run: compiled, or wrapped.
        loss: Of both features and the logit scale.
        texts: The captions as the model reads them, on the device.
    """

    def __init__(
        self,
        model: CLIP | CustomTextCLIP,
        benchmark: Benchmark,
        images: Tensor,
        captions: Tensor,
        spec: StrategySpec | None = None,
    ) -> None:
        self.title = PLAIN_TITLE if spec is None else spec.title
        self.images, self.captions, self.autocast = images, captions, benchmark.autocast
        self.model = copy.deepcopy(model, {id(p): p for p in model.parameters()}).train()
        self._trim: CaptionTrimmer | None = None
        if spec is not None:
            strategy = spec.build(mask_ratio=benchmark.mask_ratio)
            apply_masking(allow_short_text(self.model), strategy, pack_tokens=benchmark.pack_tokens)
            set_masking_progress(self.model, benchmark.progress)
            if benchmark.trims:
                # As training does: groups of several lengths are compiled for each combination.
                shares = (1.0,) if benchmark.compiles else GROUP_SHARES
                self._trim = caption_trimmer(self.model, shares=shares)
        self.texts: Tensor | CaptionGroups
        self.read(captions)
        self.runnable: nn.Module = self.model
        if benchmark.compiles:
            self.runnable = torch.compile(self.model)  # type: ignore[assignment]
        self.loss = ClipLoss()

    def read(self, captions: Tensor) -> None:
        """Go on with other captions (B, T), on the CPU, trimmed as the setup trims them."""
        texts = captions if self._trim is None else self._trim(captions)
        self.texts = texts.to(self.images.device)

    def forward(self) -> Tensor:
        """Run the model and the loss."""
        with self.autocast():
            features = self.runnable(self.images, self.texts)
            return self.loss(*features[:3])

    def selection(self) -> Callable[[], object] | None:
        """Return what chooses patches, by itself and ready to run; None where nothing does."""
        masking = masking_or_none(self.model)
        if masking is None or not masking.is_active(training=True):
            return None
        images = self.images
        with torch.no_grad(), self.autocast():
            tokens = self.model.visual.embed_patches(images)

        def select() -> object:
            with torch.no_grad(), self.autocast():
                return masking.select(images, tokens)

        return select

    def text_tokens(self) -> float:
        """Return how many tokens the text tower reads per caption, on average."""
        if isinstance(self.texts, CaptionGroups):
            return self.texts.mean_length()
        return float(self.texts.shape[1])

    def step_flops(self) -> float:
        """Count the operations of a step: forward, backward and selection of the whole batch.

        Matrix products and convolutions count, a multiply-add as two operations. The similarity
        matrix of the loss and the optimizer are left out; they are small.
        """
        images = self.images
        groups = self.texts.tokens if isinstance(self.texts, CaptionGroups) else (self.texts,)
        total = len(images) * self._flops_each(self.model.encode_image, images[:_SOME])
        return total + sum(
            len(g) * self._flops_each(self.model.encode_text, g[:_FEW]) for g in groups
        )

    def _flops_each(self, encode: Callable[[Tensor], Tensor], inputs: Tensor) -> float:
        def run() -> list[Tensor]:
            with self.autocast():
                return [encode(inputs)]

        return sum(count_pass(self.model, run)) / len(inputs)


# ------------------------------------------------------------------------------------------------
# What it takes
# ------------------------------------------------------------------------------------------------


def time_parts(device: torch.device, *parts: Callable[[], object]) -> list[float]:
    """Run the parts of a computation one after the other and return the seconds of each.

    A GPU is timed by its own events, so that nothing waits in between; one thread of a CPU by
    processor time, which other processes do not lengthen; several threads by the clock.
    """
    clock = process_time if torch.get_num_threads() == 1 else perf_counter

    def mark() -> Any:
        if device.type != "cuda":
            return clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event

    marks = [mark()]
    for part in parts:
        part()
        marks.append(mark())
    if device.type != "cuda":
        return [max(second - first, TICK) for first, second in pairwise(marks)]
    torch.cuda.synchronize(device)
    return [first.elapsed_time(second) / 1000 for first, second in pairwise(marks)]


@dataclass
class Timings:
    """What the steps of a setup took.

    Attributes:
        title: The setup's.
        text_tokens: See `Setup.text_tokens`.
        flops: See `Setup.step_flops`.
        seconds: Of each of `PARTS`, one row per round; `selection` is measured by itself, and is
            inside `forward` too.
        peak_bytes: Highest memory of the GPU during a step; None on a CPU.
    """

    title: str
    text_tokens: float
    flops: float
    seconds: list[list[float]] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def steps(self) -> list[float]:
        """Seconds of whole steps."""
        return [sum(parts[1:]) for parts in self.seconds]


def time_steps(
    setups: Sequence[Setup], optimizer: torch.optim.Optimizer, *, num_rounds: int
) -> list[Timings]:
    """Count the operations of training steps, and time them: in every round, one of each setup.

    Args:
        setups: They share their weights.
        optimizer: Of these weights.
        num_rounds: Rounds that count; one more comes first.
    """
    device = setups[0].images.device
    losses: list[Tensor] = []

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    all_timings = [Timings(s.title, s.text_tokens(), s.step_flops()) for s in setups]
    steps = list(product(range(num_rounds + 1), zip(setups, all_timings, strict=True)))
    for round_number, (setup, timings) in tqdm(steps, leave=False, disable=None):
        select = setup.selection()
        seconds = [0.0] if select is None else time_parts(device, select)
        # It holds embedded patches, which would count as memory of the step.
        del select
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)

        def forward(setup: Setup = setup) -> None:
            losses.append(setup.forward())

        seconds += time_parts(device, forward, lambda: losses.pop().backward(), update)
        if round_number > 0:
            timings.seconds.append(seconds)
        if device.type == "cuda":
            timings.peak_bytes = torch.cuda.max_memory_allocated(device)
    return all_timings


@dataclass(frozen=True)
class Peak:
    """A device's highest rate.

    Args:
        flops: Operations per second.
        source: Where the number comes from.
    """

    flops: float
    source: str


def known_peak(device_name: str, *, is_half: bool) -> Peak | None:
    """Return a GPU's peak out of its data sheet, None for one that is not listed.

    Args:
        device_name: As `torch.cuda.get_device_name` gives it.
        is_half: Whether matrix products run at 16 bits; else they count as TF32.
    """
    for name, half, tf32, source in _TENSOR_CORES:
        if name in device_name:
            return Peak(1e12 * (half if is_half else tf32), source)
    return None


def measured_peak(device: torch.device) -> Peak:
    """Measure the rate of a large matrix product, with as many threads as torch uses now."""
    factor = torch.randn(_PEAK_SIDE, _PEAK_SIDE, device=device)
    seconds = time_parts(device, *[lambda: factor @ factor] * (_PEAK_REPEATS + 1))
    # The first one warms up.
    rate = 2 * _PEAK_SIDE**3 / median(seconds[1:])
    return Peak(rate, f"measured, a product of {_PEAK_SIDE} x {_PEAK_SIDE} matrices")


def watch_compilation(setup: Setup, *, vocab_size: int) -> dict[str, int]:
    """Count how often a setup's model, compiled, leaves its graph or needs another, forward.

    Breaks and guards are found before code is made of a graph, which would take minutes; so none
    is made here, and nothing of it is left for the compiled model.

    Args:
        setup: Its weights stay as they are, and its captions come back.
        vocab_size: Token ids are below it.

    Returns:
        `graph_breaks`, places where it leaves its graph, and `recompilations`, graphs that were
        added after three batches, whose longest captions differ, by six whose longest captions
        differ again.
    """
    own, runnable = setup.captions, setup.runnable
    batch_size, context_length = own.shape

    def run(share: float) -> None:
        """Read captions the longest of which fills a share of the context."""
        longest = max(_SHORTEST, round(share * context_length))
        short = draw_captions(
            "web", batch_size=batch_size, context_length=longest, vocab_size=vocab_size
        )
        short[0] = 1
        short[0, -1] = vocab_size - 1
        setup.read(nn.functional.pad(short, (0, context_length - longest)))
        setup.forward()

    torch._dynamo.reset()
    counters.clear()
    setup.runnable = torch.compile(setup.model, backend="eager")  # type: ignore[assignment]
    try:
        for share in _WARM_UP:
            run(share)
        graphs_before = counters["frames"]["total"]
        for share in _LATER:
            run(share)
        return {
            "graph_breaks": sum(counters["graph_break"].values()),
            "recompilations": counters["frames"]["total"] - graphs_before,
        }
    finally:
        setup.runnable = runnable
        setup.read(own)
        torch._dynamo.reset()


def make_rows(
    timings: Sequence[Timings], *, batch_size: int, peak: Peak | None
) -> list[dict[str, Any]]:
    """Sum up setups, the first of which is what the others are compared with.

    Returns:
        A row per setup; seconds are medians over rounds:

        - `title` and `text_tokens`, which the text tower reads per caption, on average;
        - `selection`, seconds of choosing patches, measured by itself, and `selection_share` of
          the step;
        - `forward`, `backward` and `update`, seconds of model and loss, of the gradients and of
          the optimizer, and `step`, of the three together;
        - `samples_per_second`; `peak_gib`, the highest memory of the GPU during a step, weights
          included, None on a CPU; `flops`, operations of a step;
        - `time_over_first`, median of the rounds' ratios, `flops_over_first`, and
          `time_over_ideal`, the one over the other: 1 turns every saved operation into saved time;
        - `utilization`, operations per second as a share of the peak, None where that is not known;
        - `graph_breaks` and `recompilations`, None for a model that is not compiled.
    """
    rows, first = [], timings[0]
    for one in timings:
        parts = dict(zip(PARTS, map(median, zip(*one.seconds, strict=True)), strict=True))
        step = median(one.steps)
        time_ratio = median(a / b for a, b in zip(one.steps, first.steps, strict=True))
        row = {
            "title": one.title,
            "text_tokens": one.text_tokens,
            "selection": parts.pop("selection"),
            "selection_share": 0.0,
            **parts,
            "step": step,
            "samples_per_second": batch_size / step,
            "peak_gib": None if one.peak_bytes is None else one.peak_bytes / 2**30,
            "flops": one.flops,
            "time_over_first": time_ratio,
            "flops_over_first": one.flops / first.flops,
            "time_over_ideal": time_ratio * first.flops / one.flops,
            "utilization": None if peak is None else one.flops / step / peak.flops,
            "graph_breaks": None,
            "recompilations": None,
        }
        rows.append(row | {"selection_share": row["selection"] / step})
    return rows


# ------------------------------------------------------------------------------------------------
# What is told
# ------------------------------------------------------------------------------------------------


def cost_table(rows: Sequence[dict[str, Any]], *, batch_size: int) -> str:
    """Return a table with a line per setup; compiled models have two more columns."""
    columns: Columns = {
        "": ("title", 1, "{}"),
        "tokens": ("text_tokens", 1, "{:.1f}"),
        "selection": ("selection", 1000, "{:.2f}"),
        "share": ("selection_share", 1, "{:.2%}"),
        "forward": ("forward", 1000, "{:.1f}"),
        "backward": ("backward", 1000, "{:.1f}"),
        "update": ("update", 1000, "{:.1f}"),
        "step": ("step", 1000, "{:.1f}"),
        "samples/s": ("samples_per_second", 1, "{:.1f}"),
        "GiB": ("peak_gib", 1, "{:.2f}"),
        "GFLOPs": ("flops", 1e-9 / batch_size, "{:.2f}"),
        "time": ("time_over_first", 1, "{:.3f}"),
        "FLOPs": ("flops_over_first", 1, "{:.3f}"),
        "ideal": ("time_over_ideal", 1, "{:.3f}"),
        "peak": ("utilization", 1, "{:.0%}"),
    }
    if rows[0]["graph_breaks"] is not None:
        columns |= {"breaks": ("graph_breaks", 1, "{}"), "recompiled": ("recompilations", 1, "{}")}
    # Where nothing is selected, nothing was measured.
    names = ("selection", "selection_share")
    return measured_table([row | {n: row[n] or None for n in names} for row in rows], columns)


def measured_table(rows: Sequence[Mapping[str, Any]], columns: Columns) -> str:
    """Return measurements as a table for the terminal, a dash where there is none.

    Args:
        rows: Values by name.
        columns: What is shown, in which form.
    """
    lines = [
        [
            Cell(row[n], "-" if row[n] is None else form.format(by * row[n]).replace("%", " %"))
            for n, by, form in columns.values()
        ]
        for row in rows
    ]
    return Table.of(list(columns), lines).text()


def plot_cost(
    rows: Sequence[dict[str, Any]], path: Path, *, batch_size: int, peak: Peak | None, title: str
) -> None:
    """Draw a point per setup into a PNG file.

    On a line, samples per second times operations per sample is one rate: the device's peak, and
    what the first setup reaches. A point below the latter loses saved operations again.

    Args:
        rows: What was measured.
        path: File to write.
        batch_size: Samples per step.
        peak: The device's, where it is known.
        title: Stands above.

    Raises:
        OSError: If the file cannot be written.
    """
    from matplotlib.figure import Figure

    from clip_pgs import plots

    gflops = [row["flops"] / batch_size / 1e9 for row in rows]
    rates = {f"rate of {rows[0]['title']}": (rows[0]["flops"] / rows[0]["step"] / 1e9, "--")}
    if peak is not None:
        rates["peak"] = (peak.flops / 1e9, "-")
    ends = [min(gflops) / _ROOM, max(gflops) * _ROOM]
    with plots.plot_style():
        drawing = Figure(figsize=(6.4, 5.4), layout="constrained")
        axes = drawing.subplots()
        for name, (rate, line) in rates.items():
            label = f"{name}: {rate:.0f} GFLOP/s"
            axes.plot(
                ends, [rate / x for x in ends], line, color=plots.MIDDLE, linewidth=1.2, label=label
            )
        for number, (row, x) in enumerate(zip(rows, gflops, strict=True)):
            look = plots.look_of(number - 1) if number else {"color": plots.INK, "marker": "P"}
            look |= {"linestyle": "none", "label": plots.legend_label(row["title"])}
            axes.plot(x, row["samples_per_second"], **look, markersize=7)
        axes.set(xscale="log", yscale="log", ylabel="samples per second", title=title)
        for axis in (axes.xaxis, axes.yaxis):
            plots.log_ticks(axis)
        axes.set_xlabel("GFLOPs per sample, forward and backward")
        drawing.legend(loc="outside lower center", ncols=3, fontsize=8)
        write_bytes(path, plots.picture(drawing, "png"))


def run_cost(args: argparse.Namespace) -> None:
    """Measure, print the table and write the files.

    Raises:
        ValueError: If an option is wrong, or a file cannot be written.
    """
    fill_in_defaults(args)
    specs = parse_specs(args.maskings, mask_ratio=args.mask_ratio)
    strategies = [spec.build(mask_ratio=args.mask_ratio) for spec in specs]
    if args.pack_tokens is not None and not any(s.keeps_different_counts() for s in strategies):
        raise ValueError(
            f"pack_tokens has no effect on {', '.join(args.maskings)}: each keeps as many patches "
            "of every image"
        )
    if args.mask_ratio is None:
        # Given, it would have to have an effect, which it has not where `none` alone is timed.
        args.mask_ratio = MASK_RATIO
    if args.output is not None:
        check_writable(args.output / "cost.json", args.output / "cost.png")
    benchmark = Benchmark.of(args)
    model = benchmark.build()
    images, texts = benchmark.draw(model)
    setups = [Setup(model, benchmark, images, texts, spec) for spec in (None, *specs)]
    peak = None
    if args.device.type == "cuda":
        device_name = torch.cuda.get_device_name(args.device)
        peak = known_peak(device_name, is_half=args.precision != "fp32")
    elif args.precision == "fp32":
        # A CPU's data sheet says little about a virtual machine's share of it.
        peak = measured_peak(args.device)
    compilations: list[dict[str, int]] = []
    if args.compiles:
        compilations = [watch_compilation(s, vocab_size=model.vocab_size) for s in setups]
        # A graph of each model, which share their code. Past its limit the compiler runs code
        # uncompiled without a word.
        torch._dynamo.config.recompile_limit += len(setups)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    timings = time_steps(setups, optimizer, num_rounds=args.steps)
    rows = make_rows(timings, batch_size=args.batch_size, peak=peak)
    # Empty where nothing is compiled.
    for row, counts in zip(rows, compilations, strict=False):
        row.update(counts)
    height, width = images.shape[2:]
    device = describe_device(args.device)
    title = (
        f"{args.model} at {height} x {width}, batch {args.batch_size}, {args.precision}, "
        f"{device}{', compiled' if args.compiles else ''}"
    )
    sys.stdout.write(
        f"{title}\n\n{cost_table(rows, batch_size=args.batch_size)}\n"
        "tokens: read by the text tower per caption; share: of the step that selection takes; "
        "times in ms; GFLOPs: per sample;\ntime, FLOPs: over the first line's; ideal: time over "
        "FLOPs; peak: share of the device's "
        f"{'peak' if peak is None else f'{peak.flops / 1e9:.0f} GFLOP/s, {peak.source}'}\n"
    )
    if args.compiles:
        sys.stdout.write(
            "breaks: of the graph; recompiled: graphs added by captions of other lengths, after "
            "three\n"
        )
    if args.output is None:
        return
    same = ("model", "batch_size", "precision", "captions", "mask_ratio", "progress")
    facts = {
        **{name: getattr(args, name) for name in same},
        "image_size": [height, width],
        "device": device,
        "is_compiled": args.compiles,
        "is_trimmed": args.trims,
        "is_packed": args.pack_tokens,
        "rounds": args.steps,
        "reference": PLAIN_TITLE,
        "peak_flops": peak and peak.flops,
        "peak_source": peak and peak.source,
        "torch": torch.__version__,
        "open_clip": open_clip.__version__,
        "date": datetime.now(timezone.utc).date().isoformat(),
        "results": rows,
    }
    write_json(args.output / "cost.json", facts)
    picture = args.output / "cost.png"
    plot_cost(rows, picture, batch_size=args.batch_size, peak=peak, title=title)
    sys.stdout.write(f"\n{args.output}: cost.json, cost.png\n")


def check_effect(args: argparse.Namespace, needed: str, *options: str) -> None:
    """Refuse options that have no effect without another one; None is one that was left out.

    Raises:
        ValueError: If one is given, and that which it needs is not.
    """
    for option in options:
        if getattr(args, needed) is None and getattr(args, option) is not None:
            flag = f"--{option.replace('_', '-')}"
            raise ValueError(f"{flag} has no effect without --{needed}")


def fill_in_defaults(args: argparse.Namespace) -> None:
    """Give options that were left out the device's values; the device becomes torch's.

    Raises:
        ValueError: If the device is not there.
    """
    name = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.device = usable_device(name)
    if args.device.type not in DEFAULTS:
        raise ValueError(f"--device takes {' or '.join(DEFAULTS)}, got {name}")
    for option, value in DEFAULTS[args.device.type].items():
        if getattr(args, option) is None:
            setattr(args, option, value)


def describe_device(device: torch.device) -> str:
    """Return what a device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {counted(torch.get_num_threads(), 'thread')}"
