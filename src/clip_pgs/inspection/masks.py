"""Pictures of what each strategy keeps, in the manner of the CLIP-PGS paper's Figure 1a."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from clip_pgs.inspection.figure import Column, Legend, Panel, draw_figure
from clip_pgs.inspection.images import open_image
from clip_pgs.inspection.model_input import ModelInput
from clip_pgs.inspection.stage_pictures import stage_columns
from clip_pgs.inspection.stages import pgs_stages
from clip_pgs.inspection.view import View, fit_strategy, seeded_noise
from clip_pgs.masking import MaskingStrategy
from clip_pgs.masking.pgs import PGSMasking
from clip_pgs.masking.sampling import paint_kept
from clip_pgs.masking.strategy import patch_grid

# Smaller images are enlarged by a whole number until their shorter side reaches this.
PANEL_SIZE = 224


def draw_masks(
    images: Sequence[Image.Image | str | Path],
    strategies: Mapping[str, MaskingStrategy],
    *,
    model_input: ModelInput | None = None,
    model: nn.Module | None = None,
    progress: float = 0.0,
    stages: bool = False,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Image.Image:
    """Draw images and what each strategy keeps of them, masked patches in grey.

    A strategy that training would calibrate (`cluster`) is fitted to these images; the one that
    was passed stays as it is.

    Args:
        images: Pictures of any size and mode, or their files; each is cropped as the model would
            crop it, after training's way of reading it: not turned by its EXIF orientation,
            and without its transparency.
        strategies: Each by the title of its column.
        model_input: Image size, patch size and normalisation; None means 224 px in patches of 16.
        model: A trained OpenCLIP model for strategies that look at more than pixels: its patch
            embeddings, once `progress` > 0, and its attention.
        progress: Completed share of the masked training steps, in [0, 1].
        stages: Draw the steps of every PGS strategy before its column.
        names: Captions of the originals; None leaves them out.
        seed: Of the random draw, which is the same for every strategy.

    Returns:
        One row per image: the original, then what each strategy keeps, with its mask ratio.

    Raises:
        ValueError: If there is no image, `names` are not as many as `images`, a strategy needs a
            model and there is none, `stages` are asked for without a PGS strategy, an image
            cannot be read, or the figure would have more pixels than Pillow opens.
    """
    if not images:
        raise ValueError("there is no image to draw")
    names = [""] * len(images) if names is None else names
    if len(names) != len(images):
        raise ValueError(f"names must be as many as images, {len(images)}, got {len(names)}")
    if stages and not any(isinstance(strategy, PGSMasking) for strategy in strategies.values()):
        raise ValueError(f"stages are those of pgs, which is not among {', '.join(strategies)}")
    model_input = ModelInput() if model_input is None else model_input
    view = View(model_input, model, progress)

    num_columns = 1 + len(strategies)
    if stages:
        num_columns += sum(
            3 + strategy.options.edges
            for strategy in strategies.values()
            if isinstance(strategy, PGSMasking)
        )
    _check_size(model_input, num_columns, len(images))
    crops = [
        model_input.crop(image if isinstance(image, Image.Image) else open_image(Path(image)))
        for image in images
    ]
    enlarged, patch_size = _enlarge(crops, model_input)
    pixels = model_input.normalise(crops)
    grid_size = patch_grid(model_input.image_size, model_input.patch_size)
    noise_BN = seeded_noise(len(crops), grid_size[0] * grid_size[1], seed=seed)

    columns = [Column("original", _panels(enlarged, names))]
    for title, strategy in strategies.items():
        inputs = replace(view.inputs(pixels, strategy), noise=noise_BN)
        legend = None
        if stages and isinstance(strategy, PGSMasking):
            found = pgs_stages(strategy, inputs)
            columns += stage_columns(strategy, found, enlarged, grid_size)
            legend = Legend("The highest scores are masked, the rest is what the model sees.")
        with torch.no_grad():
            selection = fit_strategy(strategy, [inputs], progress=progress)(inputs)
        mask_ratios = 1 - selection.kept_counts() / inputs.num_patches
        captions = [f"{mask_ratio:.2f} masked" for mask_ratio in mask_ratios.tolist()]
        kept = paint_kept(enlarged, selection, patch_size)
        columns.append(Column(title, _panels(kept, captions), legend))
    return draw_figure(columns)


def _check_size(model_input: ModelInput, num_columns: int, num_rows: int) -> None:
    scale = _scale(model_input)
    height, width = (scale * side for side in model_input.image_size)
    # Pillow refuses to open more than twice its warning limit.
    if height * width * num_columns * num_rows > 2 * (Image.MAX_IMAGE_PIXELS or 2**27):
        raise ValueError(
            f"the figure would be {num_rows} rows of {num_columns} pictures of {height} x {width} "
            "pixels, more than programs open; draw fewer or smaller images"
        )


def _scale(model_input: ModelInput) -> int:
    return math.ceil(PANEL_SIZE / min(model_input.image_size))


def _enlarge(
    crops: Sequence[Image.Image], model_input: ModelInput
) -> tuple[Tensor, tuple[int, int]]:
    """Return crops at a size worth looking at, in [0, 1], and the patch size that goes with it."""
    height, width = model_input.image_size
    scale = _scale(model_input)
    size = (width * scale, height * scale)
    pixels = torch.stack([pil_to_tensor(crop.resize(size)) for crop in crops]).float() / 255
    patch_height, patch_width = model_input.patch_size
    return pixels, (patch_height * scale, patch_width * scale)


def _panels(pixels: Tensor, captions: Sequence[str]) -> list[Panel]:
    pictures = [to_pil_image(picture) for picture in pixels]
    return list(zip(pictures, captions, strict=True))
