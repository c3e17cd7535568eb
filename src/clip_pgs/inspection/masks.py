"""Pictures of what each strategy keeps, in the manner of the CLIP-PGS paper's Figure 1a."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from clip_pgs.inspection.figure import Panel, draw_figure
from clip_pgs.inspection.model_input import ModelInput
from clip_pgs.masking import (
    MaskingStrategy,
    PatchInputs,
    PatchSelection,
    create_masking,
    masking_options,
)
from clip_pgs.masking.patches import paint_kept

# Smaller images are enlarged by a whole number until their shorter side reaches this.
PANEL_SIZE = 224


def draw_masks(
    images: Sequence[Image.Image],
    strategies: Mapping[str, MaskingStrategy],
    *,
    model_input: ModelInput | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
) -> Image.Image:
    """Draw images and what each strategy keeps of them, masked patches in grey.

    Selections are those at the start of training (`progress` 0), where pixels alone decide.

    Args:
        images: Of any size and mode; each is cropped as the model would crop it.
        strategies: Each by the title of its column.
        model_input: Image size, patch size and normalisation; None means 224 px in patches of 16.
        names: Captions of the originals; None leaves them out.
        seed: Of the random draw, which is the same for every strategy.

    Returns:
        One row per image: the original, then what each strategy keeps, with its mask ratio.

    Raises:
        ValueError: If there is no image, or `names` are not as many as `images`.
    """
    if not images:
        raise ValueError("there is no image to draw")
    names = [""] * len(images) if names is None else names
    if len(names) != len(images):
        raise ValueError(f"names must be as many as images, {len(images)}, got {len(names)}")
    model_input = ModelInput() if model_input is None else model_input

    crops = [model_input.crop(image) for image in images]
    enlarged, patch_size = _enlarge(crops, model_input)
    inputs = PatchInputs(model_input.normalise(crops), model_input.patch_size)
    columns = {"original": _panels(enlarged, names)}
    for title, strategy in strategies.items():
        selection = select_patches(strategy, inputs, seed=seed)
        mask_ratios = 1 - selection.kept_counts() / inputs.num_patches
        captions = [f"{mask_ratio:.2f} masked" for mask_ratio in mask_ratios.tolist()]
        columns[title] = _panels(paint_kept(enlarged, selection, patch_size), captions)
    return draw_figure(columns)


def select_patches(
    strategy: MaskingStrategy, inputs: PatchInputs, *, seed: int = 0
) -> PatchSelection:
    """Let a strategy choose, from a random stream of its own."""
    generator = torch.Generator(device=inputs.device).manual_seed(seed)
    with torch.no_grad():
        return strategy(inputs, generator=generator)


def create_strategies(
    names: Sequence[str], *, mask_ratio: float | None = None, mask_ratio_min: float | None = None
) -> dict[str, MaskingStrategy]:
    """Build strategies by name, giving each of them the ratios that it takes.

    Raises:
        ValueError: If a name is unknown, a ratio is out of its range, or none of the strategies
            takes a ratio that is given.
    """
    ratios = {"mask_ratio": mask_ratio, "mask_ratio_min": mask_ratio_min}
    options = {option: ratio for option, ratio in ratios.items() if ratio is not None}
    for option in options:
        if not any(option in masking_options(name) for name in names):
            raise ValueError(f"{option} has no effect on {', '.join(names)}")
    return {
        name: create_masking(
            name,
            **{option: options[option] for option in options.keys() & masking_options(name).keys()},
        )
        for name in names
    }


def _enlarge(
    crops: Sequence[Image.Image], model_input: ModelInput
) -> tuple[Tensor, tuple[int, int]]:
    """Return crops at a size worth looking at, in [0, 1], and the patch size that goes with it."""
    height, width = model_input.image_size
    scale = math.ceil(PANEL_SIZE / min(height, width))
    size = (width * scale, height * scale)
    pixels = torch.stack([pil_to_tensor(crop.resize(size)) for crop in crops]).float() / 255
    patch_height, patch_width = model_input.patch_size
    return pixels, (patch_height * scale, patch_width * scale)


def _panels(pixels: Tensor, captions: Sequence[str]) -> list[Panel]:
    pictures = [to_pil_image(picture) for picture in pixels]
    return list(zip(pictures, captions, strict=True))
