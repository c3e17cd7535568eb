"""The random numbers of a run, the masks of each step drawn from them, and pictures of masks.

A number is keyed by what it is for, not by when it is drawn: the weights by the seed alone, a
rank's stream by (seed, rank, step), the masks of a step by (seed, step) and a sample's row in the
global batch. Accumulation, world size and resuming thus change no mask.
"""

from __future__ import annotations

import io
import logging
import math
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from open_clip import CLIP
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import save_image

from clip_pgs.checkpoint_reading import read_tensors
from clip_pgs.data.order import stable_seed
from clip_pgs.figure import PANEL_SIZE, Column, draw_figure
from clip_pgs.files import write_bytes
from clip_pgs.integrations.open_clip import (
    calibrate_masking,
    last_selection,
    num_patches,
    patch_size,
    pixel_dtype,
    set_mask_ratio,
    set_masking_noise,
    set_masking_progress,
)
from clip_pgs.integrations.open_clip.conv import aside_from_training
from clip_pgs.masking import masking_options
from clip_pgs.masking.sampling import paint_kept
from clip_pgs.masking.schedule import scheduled_levels, scheduled_ratio
from clip_pgs.training.distributed import mean_over_ranks
from clip_pgs.training.loggers import BestEffort
from clip_pgs.training.options import TrainOptions

_NUM_PICTURES = 8
_IMAGES_NAME = "images.pt"

_logger = logging.getLogger(__name__)


def seed_everything(seed: int) -> None:
    """Seed the global streams of Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def step_noise(
    seed: int, step: int, *, num_samples: int, num_patches: int, device: torch.device
) -> Tensor:
    """Draw the numbers behind all masks of one optimizer step.

    Args:
        seed: The run's seed.
        step: Optimizer steps completed before this one.
        num_samples: Samples of the step over all ranks and micro-batches.
        num_patches: Patches per image.
        device: Where to draw. The CPU and CUDA draw different numbers.

    Returns:
        Uniform numbers in [0, 1), the same on every rank. Shape (num_samples, num_patches),
        float32.
    """
    generator = torch.Generator(device).manual_seed(stable_seed(seed, "masks", step))
    return torch.rand((num_samples, num_patches), generator=generator, device=device)


def micro_batch_rows(*, micro_batch: int, rank: int, world_size: int, batch_size: int) -> slice:
    """Return which rows of the global batch one rank's micro-batch holds.

    The order is micro-batch, rank, sample: two ranks without accumulation and one process with
    two micro-batches that read the same samples give them the same rows.
    """
    start = (micro_batch * world_size + rank) * batch_size
    return slice(start, start + batch_size)


class StepMasks:
    """Gives each micro-batch its own rows of the step's random numbers, as often as asked.

    Args:
        model: The plain masked model.
        options: The phase's: `seed`, `batch_size` (of a micro-batch on one rank), `accum_freq`,
            `rank`, `world_size`, `mask_schedule` and what belongs to it.
    """

    def __init__(self, model: nn.Module, options: TrainOptions) -> None:
        self.num_patches = num_patches(model)
        self._model = model
        self._options = options
        self._ratio: float | None = None
        self._noise: Tensor | None = None
        self._kept: dict[int, Tensor] = {}
        self._current: int | None = None

    def follow_schedule(self, step: int, *, total_steps: int) -> bool:
        """Set the ratio of a step, where a schedule asks for another; return whether it did."""
        options = self._options
        if options.mask_schedule == "constant":
            return False
        ratio = scheduled_ratio(
            _first_ratio(options),
            options.mask_ratio_end,
            progress=min(step / total_steps, 1.0),
            kind=options.mask_schedule,
            num_levels=options.mask_schedule_steps,
        )
        if ratio == self._ratio:
            return False
        set_mask_ratio(self._model, ratio)
        self._ratio = ratio
        return True

    def start_step(self, step: int, *, total_steps: int, device: torch.device) -> None:
        """Draw a step's numbers and tell the strategy how far the run is."""
        set_masking_progress(self._model, min(step / total_steps, 1.0))
        options = self._options
        self._noise = step_noise(
            options.seed,
            step,
            num_samples=options.batch_size * options.accum_freq * options.world_size,
            num_patches=self.num_patches,
            device=device,
        )
        self._kept, self._current = {}, None

    def calibrate(self, images: Tensor) -> None:
        """Let the strategy look at a step's first micro-batch, (B, 3, H, W), if it asks to.

        It sees that of every rank and takes the mean over ranks.
        """
        set_masking_noise(self._model, self._rows(0))
        average = partial(mean_over_ranks, device=images.device)
        calibrate_masking(self._model, images, average=average)

    def set_noise(self, micro_batch: int) -> None:
        """Make the coming forward pass choose patches by this micro-batch's numbers."""
        self._remember_kept()
        self._current = micro_batch
        set_masking_noise(self._model, self._rows(micro_batch))

    def finish_step(self) -> list[Tensor]:
        """Return how many patches each image kept, one (B,) per micro-batch; forget the numbers."""
        self._remember_kept()
        set_masking_noise(self._model, None)
        self._noise, self._current = None, None
        return list(self._kept.values())

    def _rows(self, micro_batch: int) -> Tensor:
        assert self._noise is not None
        rows = micro_batch_rows(
            micro_batch=micro_batch,
            rank=self._options.rank,
            world_size=self._options.world_size,
            batch_size=self._options.batch_size,
        )
        return self._noise[rows]

    def _remember_kept(self) -> None:
        if self._current is not None:
            selection = last_selection(self._model)
            assert selection is not None
            self._kept[self._current] = selection.kept_counts()


def mask_levels(options: TrainOptions, *, num_steps: int) -> Sequence[tuple[float | None, int]]:
    """Return a phase's mask ratios in their order, each with the steps that it lasts.

    Args:
        options: The phase's.
        num_steps: Steps of the phase.

    Returns:
        A single ratio, None, where no schedule changes that of the strategy.
    """
    if options.mask_schedule == "constant":
        return [(None, num_steps)]
    return scheduled_levels(
        _first_ratio(options),
        options.mask_ratio_end,
        num_steps=num_steps,
        kind=options.mask_schedule,
        num_levels=options.mask_schedule_steps,
    )


def _first_ratio(options: TrainOptions) -> float:
    default = masking_options(options.masking)["mask_ratio"]
    return options.masking_options.get("mask_ratio", default)


class MaskPictures:
    """Pictures of what the masking keeps of the first images that a run ever saw.

    What cannot be written is told once, and the run goes on.

    Args:
        folder: The run's folder of pictures, where the images are kept for a resumed run.
        model: The plain masked model; its mode, its random streams, weights and buffers stay as
            they are, no other process is waited for, and the noise given to it is forgotten.
        name: Of the masking, for the labels.
        seed: The run's seed: the same images show the same masks of the same scores.
    """

    def __init__(self, folder: Path, model: CLIP, *, name: str, seed: int) -> None:
        self._folder = folder
        self._name = name
        self._model = model
        self._seed = seed
        self._images: Tensor | None = None
        self._best_effort = BestEffort("masks")

    def choose(self, candidates: Tensor) -> None:
        """Draw up to 8 of these images, (B, 3, H, W) as the model receives them, from now on.

        Those that an earlier launch chose go before, where they are of the same shape.
        """
        path = self._folder / _IMAGES_NAME
        images = _read_images(path, candidates.shape[1:]) if path.is_file() else None
        with self._best_effort:
            if images is None:
                images = candidates[:_NUM_PICTURES].float().cpu()
                content = io.BytesIO()
                # Not to the file: torch tells of a full disk as of a wrong position.
                torch.save(images, content)
                self._folder.mkdir(parents=True, exist_ok=True)
                write_bytes(path, content.getvalue())
            self._images = images.to(candidates.device)

    def draw(self, epoch: int) -> Tensor | None:
        """Save `epoch_N.png` and return it: shape (3, H', W'), in [0, 1]; None without images."""
        if self._images is None:
            return None
        labels = {"title": f"epoch {epoch}", "name": self._name}
        picture = draw_masks(self._model, self._images, seed=self._seed, **labels)
        with self._best_effort:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_image(picture, self._folder / f"epoch_{epoch}.png")
        return picture


def draw_masks(
    model: CLIP, images: Tensor, *, seed: int, title: str = "", name: str = "masking"
) -> Tensor:
    """Draw images above what the masking keeps of them at its present progress, and its ratio.

    Args:
        model: As for `MaskPictures`.
        images: As the model receives them. Shape (B, 3, H, W).
        seed: The same seed gives the same masks of the same scores.
        title: Stands above, with the masking, and with the ratio where all images have the same.
        name: Of the masking.

    Returns:
        A picture of shape (3, H', W'), in [0, 1], on the CPU.
    """
    noise = step_noise(
        seed, -1, num_samples=len(images), num_patches=num_patches(model), device=images.device
    )
    tower = model.visual
    was_training = tower.training
    devices = [images.device] if images.device.type == "cuda" else []
    set_masking_noise(model, noise)
    with torch.no_grad(), torch.random.fork_rng(devices), aside_from_training(tower):
        tower.train()
        tower(images.to(pixel_dtype(model)))
        tower.train(was_training)
    set_masking_noise(model, None)
    selection = last_selection(model)
    assert selection is not None

    mean, std = (images.new_tensor(v)[:, None, None] for v in (tower.image_mean, tower.image_std))
    pixels = (images * std + mean).clamp(0, 1)
    painted = paint_kept(pixels, selection, patch_size(model))
    scale = math.ceil(PANEL_SIZE / min(pixels.shape[2:]))
    rows = [
        map(to_pil_image, part.repeat_interleave(scale, 2).repeat_interleave(scale, 3).cpu())
        for part in (pixels, painted)
    ]
    ratios = (1 - selection.kept_counts() / num_patches(model)).tolist()
    captions = [f"{ratio:.2f} masked" for ratio in ratios]
    heading = [title, name]
    if len(set(captions)) == 1:
        heading, captions = [*heading, captions[0]], len(captions) * [""]
    # Said once, above the first image.
    titles = [", ".join(filter(None, heading)), *(len(captions) - 1) * [""]]
    columns = [
        Column(above, [(whole, ""), (kept, below)])
        for above, whole, kept, below in zip(titles, *rows, captions, strict=True)
    ]
    return pil_to_tensor(draw_figure(columns)) / 255


def _read_images(path: Path, shape: torch.Size) -> Tensor | None:
    """Return the images of a shape that an earlier launch chose, None where these are others."""
    try:
        # A run may come from a stranger: nothing large is read before it is looked at.
        images = read_tensors(path, use_mmap=True)
        is_images = isinstance(images, Tensor) and images.dtype == torch.float32
        if not (is_images and images.shape[1:] == shape and 0 < len(images) <= _NUM_PICTURES):
            wanted = f"1 to {_NUM_PICTURES} images of shape {tuple(shape)}, float32"
            raise ValueError(f"it must hold {wanted}")
    except (OSError, ValueError) as error:
        _logger.warning("%s cannot be taken: %s; it begins anew", path, error)
        return None
    return images.clone()
