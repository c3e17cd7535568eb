"""Stages a and d of `gpu_figures.py`: is training right on CUDA, and does the mask help there?"""

from __future__ import annotations

import copy
import io
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.loss import ClipLoss
from open_clip_train.precision import get_autocast
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.nn.functional import affine_grid, grid_sample, normalize
from torchvision.transforms.functional import pil_to_tensor

from clip_pgs.common import one_sentence
from clip_pgs.data.decoding import PixelNormalizer
from clip_pgs.data.samples import decode_captions, decode_image
from clip_pgs.data.shards import write_shard
from clip_pgs.data.tar import read_shard
from clip_pgs.evaluation.metrics import retrieval_metrics
from clip_pgs.files import write_json
from clip_pgs.inspection.cost.step import Benchmark
from clip_pgs.inspection.model_input import OPENAI_MEAN, OPENAI_STD
from clip_pgs.integrations.open_clip import (
    allow_short_text,
    apply_masking,
    caption_trimmer,
    force_selection,
    set_masking_progress,
)
from clip_pgs.masking import PatchInputs, PatchSelection, create_masking, list_maskings
from clip_pgs.masking.sampling import kept_patches
from clip_pgs.training.build import build_model
from clip_pgs.training.checks import check_options
from clip_pgs.training.options import parse_options
from clip_pgs.training.phases import plan_phases
from clip_pgs.training.trainer import PhaseTrainer, train

_compile = torch.compile

Rows = list[dict[str, Any]]
Parts = Iterator[tuple[str, Callable[[], Rows]]]  # a name, and what measures it

# Folders of the study's pictures.
PARTS = ("train", "test")
ADAPTIVE = ("--masking", "pgs", "--mask-ratio-min", 0.3)
# More than a precision rounds off, less than a wrong mask does. Gradients may have three times it.
TOLERANCES = {"fp32": 1e-4, "amp_bf16": 4e-2, "amp": 1e-2}


@dataclass(frozen=True)
class Sizes:
    """How much is measured, and where: `model` for speed, `small` for all else.

    `backend` is that of torch.compile; "none" compiles nothing.
    """

    out: Path
    data: Path
    device: str = "cuda"
    model: str = "ViT-B-16"
    small: str = "ViT-S-16"
    batches: tuple[int, ...] = (256, 1024, 512)
    precision: str = "amp_bf16"
    rounds: int = 10
    backend: str = "inductor"
    epochs: int = 30
    seeds: int = 8

    @classmethod
    def tiny(cls, out: Path, data: Path) -> Sizes:
        """Return what tries everything on a CPU in seconds."""
        towers = {"width": 32, "layers": 2}
        vision = {"image_size": 32, "patch_size": 8, "head_width": 16, **towers}
        text = {"context_length": 16, "vocab_size": 49408, "heads": 2, **towers}
        model = str(out / "gpu_figures_tiny.json")
        write_json(Path(model), {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text})
        return cls(out, data, "cpu", model, model, (8,), "fp32", 1, "none", 1, 1)

    def benchmark(self, **changes: Any) -> Benchmark:
        """Return how steps are measured."""
        place = (self.model, None, torch.device(self.device), self.precision, self.batches[0])
        return replace(Benchmark(*place, mask_ratio=0.5), **changes)

    def options(self, *flags: object) -> Any:
        """Return the options of a training run of the small model."""
        kind = "--model-config" if self.small.endswith(".json") else "--model"
        argv = [kind, self.small, "--device", self.device, "--precision", self.precision]
        argv += ["--workers", 0, "--warmup", 2, "--epochs", 1, "--logs", self.out / "runs", *flags]
        options = parse_options([str(arg) for arg in argv])
        check_options(options)
        return options

    def trainer(self, *flags: object, batch: int = 8) -> PhaseTrainer:
        """Return the trainer of a run on blank pictures, without the run around it."""
        amount = ("--train-num-samples", 8 * batch, "--batch-size", batch)
        options = self.options("--dataset-type", "synthetic", *amount, *flags)
        options.rank, options.local_rank, options.world_size, options.distributed = 0, 0, 1, False
        device = torch.device(self.device)
        parts = build_model(options, device)
        phase = plan_phases(options, parts)[0]
        trainer = PhaseTrainer(phase, parts, device, scaler=None, checkpoint=None)
        trainer.start_epoch(0)
        return trainer


# ------------------------------------------------------------------------------------------------
# a. Is it right?
# ------------------------------------------------------------------------------------------------


def correctness(sizes: Sizes) -> Parts:
    """Compare with the CPU, and look for waits, recompilations and lost bits."""
    yield "padding and packing", lambda: compare_with_cpu(sizes)
    yield "evaluation", lambda: compare_evaluation(sizes)
    # The tests have all strategies on a CPU, where nothing waits.
    names = list_maskings() if sizes.device == "cuda" else ["cluster", "pgs"]
    yield "waits", lambda: [look_for_waits(sizes, name) for name in names]
    yield "recompilation", lambda: [look_for_graphs(sizes, ADAPTIVE)]
    yield "resume", lambda: compare_resumed(sizes)


def _check(name: str, value: object, holds: bool | None, limit: str = "") -> dict[str, Any]:
    said = {True: "yes", False: "NO", None: "needs a GPU"}[holds]
    return {"check": name, "value": value, "limit": limit, "holds": said}


def _small_batch(sizes: Sizes) -> tuple[Any, Tensor]:
    benchmark = sizes.benchmark(model=sizes.small, device=torch.device("cpu"), batch_size=8)
    model = benchmark.build()
    return model, benchmark.draw(model)[0]


def compare_with_cpu(sizes: Sizes) -> Rows:
    """Compare selections, and features and gradients of adaptive masks, padded and packed."""
    torch.backends.cudnn.allow_tf32 = False
    model, images = _small_batch(sizes)
    num_patches = math.prod(model.visual.grid_size)
    noise = torch.rand(len(images), num_patches, generator=torch.Generator().manual_seed(0))
    strategy = create_masking("pgs", mask_ratio=0.5, mask_ratio_min=0.3)

    def select(name: str) -> tuple[PatchSelection, Tensor]:
        inputs = PatchInputs(images.to(name), model.visual.patch_size, noise=noise.to(name))
        selection = strategy(inputs)
        return selection, kept_patches(selection, num_patches).cpu()

    (selection, kept), (_, kept_there) = select("cpu"), select(sizes.device)
    share = float((kept == kept_there).double().mean())
    rows = [_check("patches as on the CPU", f"{share:.2%}", share >= 0.999, "99.9 %")]
    expected = _run_masked(model, images, selection, "cpu", "fp32", pack=False)
    halves = [(precision, pack) for precision in ("amp_bf16", "amp") for pack in (False, True)]
    for precision, pack in [("fp32", False), *halves]:
        found = _run_masked(model, images, selection, sizes.device, precision, pack=pack)
        for what, a, b, factor in zip(
            ("features", "gradients"), found, expected, (1, 3), strict=True
        ):
            error, limit = float((a - b).norm() / b.norm()), factor * TOLERANCES[precision]
            name = f"{what}, {precision}, {'packed' if pack else 'padded'}: error to the CPU"
            rows.append(_check(name, f"{error:.1e}", error <= limit, f"{limit:.0e}"))
    return rows


def _run_masked(
    model: nn.Module, images: Tensor, kept: PatchSelection, device: str, kind: str, *, pack: bool
) -> tuple[Tensor, Tensor]:
    """Return features and gradients of the image tower, in float64 on the CPU."""
    model = copy.deepcopy(model).to(device).train()
    apply_masking(model, "pgs", mask_ratio_min=0.3, pack_tokens=pack)
    kept = PatchSelection(kept.index.to(device), kept.valid.to(device))
    with force_selection(model, kept), get_autocast(kind, device_type=device)():
        features = normalize(model.encode_image(images.to(device)).float(), dim=-1)
    features.cumsum(1).square().sum().backward()
    grads = [p.grad.flatten() for p in model.visual.parameters() if p.grad is not None]
    return features.detach().cpu().double(), torch.cat(grads).cpu().double()


def compare_evaluation(sizes: Sizes) -> Rows:
    """Compare a masked model in eval mode with the plain one, bit by bit."""
    model, images = _small_batch(sizes)
    plain, images = model.to(sizes.device).eval(), images.to(sizes.device)
    masked = apply_masking(copy.deepcopy(plain), "pgs")
    rows = []
    for kind in TOLERANCES:
        with torch.no_grad(), get_autocast(kind, device_type=sizes.device)():
            is_same = torch.equal(plain.encode_image(images), masked.encode_image(images))
        rows.append(_check(f"in eval mode as OpenCLIP, {kind}", "bit for bit", is_same))
    return rows


def look_for_waits(sizes: Sizes, name: str) -> dict[str, Any]:
    """Take steps in which whatever waits for the GPU is an error."""
    # It reads how much a batch masks, now and then, unless it is given a threshold.
    fixed = ("--masking-option", "threshold=0.5") if name == "cluster" else ()
    is_cuda = sizes.device == "cuda"
    set_mode = torch.cuda.set_sync_debug_mode if is_cuda else str
    trainer = sizes.trainer("--masking", name, *fixed)
    trainer.train_step(trainer.next_batches()[0])
    for _ in range(2):
        batches = trainer.next_batches()[0]
        try:
            set_mode("error")
            trainer.train_step(batches)
        except RuntimeError as error:
            return _check(f"waits in a step, {name}", one_sentence(error)[:200], False)
        finally:
            set_mode("default")
    return _check(f"waits in a step, {name}", "none", True if is_cuda else None)


def look_for_graphs(sizes: Sizes, masking: Sequence[object]) -> dict[str, Any]:
    """Count graphs of compiled steps; what breaks or outdates them is found before any code."""
    torch._dynamo.reset()
    counters.clear()
    compiler, torch.compile = torch.compile, partial(_compile, backend="eager")
    try:
        trainer, counts = sizes.trainer("--torchcompile", *masking), []
        for _ in range(5):
            trainer.train_step(trainer.next_batches()[0])
            counts.append(counters["frames"]["total"])
    finally:
        torch.compile = compiler
    num_breaks = sum(counters["graph_break"].values())
    name = f"graphs after step 1 and 5, {' '.join(map(str, masking[1:]))}"
    said = f"{counts[0]} and {counts[-1]}, {num_breaks} breaks"
    return _check(name, said, counts[0] == counts[-1] and num_breaks == 0, "the same, 0")


def compare_resumed(sizes: Sizes) -> Rows:
    """Train a run whole, and again from its middle, with kernels that repeat their bits."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    generator, samples = torch.Generator().manual_seed(0), []
    for number in range(48):
        file = io.BytesIO()
        pixels = torch.randint(256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(file, "png")
        members = {"png": file.getvalue(), "txt": f"a picture, number {number}".encode()}
        samples.append((f"{number:04d}", members))
    write_shard(sizes.out / "pictures.tar", samples)

    def run(name: str, *flags: object) -> Path:
        given = ("--train-data", sizes.out / "pictures.tar", "--batch-size", 8, "--name", name)
        return train(sizes.options(*ADAPTIVE, "--save-every-steps", 3, *given, *flags))

    name = f"whole-{os.getpid()}"
    folder = run(name)
    again = run(f"{name}-resumed", "--resume", folder / "checkpoints" / "step_3.pt")
    files = [f / "checkpoints" / "epoch_1.pt" for f in (folder, again)]
    first, second = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    num_other = sum(not torch.equal(weight, second[name]) for name, weight in first.items())
    said = f"{num_other} of {len(first)} weights differ"
    return [_check("resumed at step 3 of 6, deterministic kernels", said, num_other == 0, "0")]


# ------------------------------------------------------------------------------------------------
# d. Does the mask help on photographs of goods, at 224 pixels?
# ------------------------------------------------------------------------------------------------


def study(sizes: Sizes) -> Parts:
    """Train three arms with each seed, pictures in the GPU's memory; nothing without data."""
    shards = {part: sorted(sizes.data.glob(f"{part}/*.tar")) for part in PARTS}
    if not all(shards.values()):
        print(f"{sizes.data} has no train/*.tar and test/*.tar: the study is left out", flush=True)
        return
    goods: dict[str, tuple[Tensor, Tensor]] = {}
    for seed in range(sizes.seeds):
        for arm in ("plain", "random", "pgs"):
            yield f"{arm}, seed {seed}", partial(train_arm, sizes, shards, goods, arm, seed)


def _read_goods(sizes: Sizes, shards: list[Path], model: Any) -> tuple[Tensor, Tensor]:
    """Return pictures (N, 3, H, W) on the device, as bytes, and token ids (N, T)."""
    size = model.visual.image_size[::-1]
    pairs = [pair for shard in shards for pair in read_shard(str(shard))]
    pictures = [
        pil_to_tensor(decode_image(p).resize(size, Image.Resampling.BICUBIC)) for p in pairs
    ]
    tokenize = open_clip.SimpleTokenizer(context_length=model.context_length)
    tokens = tokenize([decode_captions(pair)[0] for pair in pairs])
    return torch.stack(pictures).to(sizes.device), tokens


def train_arm(sizes: Sizes, shards: dict, goods: dict, arm: str, seed: int) -> Rows:
    """Train one arm and return its recall at 5, all pictures unmasked."""
    benchmark = sizes.benchmark(model=sizes.small, seed=seed)
    model, device = allow_short_text(benchmark.build()), benchmark.device
    for part in shards.keys() - goods.keys():
        goods[part] = _read_goods(sizes, shards[part], model)
    pictures, tokens = goods["train"]
    texts = caption_trimmer(model, shares=(1.0,))(tokens).to(device)
    if arm != "plain":
        apply_masking(model, arm, mask_ratio=0.5)
    finish = PixelNormalizer(OPENAI_MEAN, OPENAI_STD, device=device)
    generator = torch.Generator().manual_seed(seed)
    batch = min(2 * sizes.batches[0], len(pictures))
    num_steps = sizes.epochs * (len(pictures) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, num_steps + 1, pct_start=0.1)
    loss, step, started = ClipLoss(), 0, time.perf_counter()
    for _ in range(sizes.epochs):
        order = torch.randperm(len(pictures), generator=generator).to(device)
        for rows in order[: len(order) // batch * batch].split(batch):
            images = _random_crops(finish(pictures[rows]), generator)
            if arm != "plain":
                set_masking_progress(model, step / num_steps)
            with benchmark.autocast():
                loss(*model(images, texts[rows])[:3]).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rate.step()
            step += 1
    model.eval()
    (pictures, texts), found, said = goods["test"], [], []
    with torch.no_grad(), benchmark.autocast():
        for some, words in zip(pictures.split(256), texts.split(256), strict=True):
            found.append(model.encode_image(finish(some)).float())
            said.append(model.encode_text(words.to(device)).float())
    numbers = torch.arange(len(pictures), device=device)
    scores = retrieval_metrics(torch.cat(found), torch.cat(said), numbers)
    seconds = time.perf_counter() - started
    recall = {way: scores[f"{way}_retrieval_recall@5"] for way in ("image", "text")}
    return [{"arm": arm, "seed": seed, **recall, "seconds": seconds}]


def _random_crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """Cut out of each image a square of 0.6 to 1 of its area, mirrored by chance, of its size."""
    draws = torch.rand(4, len(images), generator=generator)
    side, theta = (0.6 + 0.4 * draws[0]).sqrt(), torch.zeros(len(images), 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = torch.where(draws[3] < 0.5, side, -side), side
    theta[:, :, 2] = ((1 - side) * (2 * draws[1:3] - 1)).T
    grid = affine_grid(theta.to(images.device), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)
