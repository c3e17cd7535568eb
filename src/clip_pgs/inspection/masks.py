"""Pictures of what each strategy keeps, in the manner of the CLIP-PGS paper's Figure 1a."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor, to_pil_image

from clip_pgs.figure import PANEL_SIZE, PAPER, Column, Panel, draw_figure, most_sides
from clip_pgs.files import atomic_file, check_writable, regular_file
from clip_pgs.inspection.model_input import (
    ModelInput,
    View,
    fit_strategy,
    image_endings,
    list_images,
    parse_specs,
    read_image,
    read_view,
    seeded_noise,
)
from clip_pgs.inspection.stages import kept_legend, pgs_stages, stage_columns
from clip_pgs.masking import MaskingStrategy
from clip_pgs.masking.pgs import PGSMasking
from clip_pgs.masking.sampling import paint_kept

# Of a patch in the steps of PGS, which have frames and numbers.
_CELL_SIZE = 32
# Of all panels. Pillow itself refuses to open pictures a third larger.
MAX_FIGURE_PIXELS = 2**27
# Of a side, by Pillow's name of the format; other formats have no limit that matters here. A PDF
# holds a JPEG.
_MAX_SIDES = {"JPEG": 65_500, "PDF": 65_500, "WEBP": 16_383, "GIF": 65_535}


def draw_masks(
    images: Sequence[Image.Image | Tensor | str | Path],
    strategies: Mapping[str, MaskingStrategy],
    *,
    model_input: ModelInput | None = None,
    model: nn.Module | None = None,
    progress: float = 0.0,
    stages: bool = False,
    names: Sequence[str] | None = None,
    seed: int = 0,
    max_side: int | None = None,
) -> Image.Image:
    """Draw images and what each strategy keeps of them, masked patches in gray.

    A strategy that training would calibrate (`cluster`) is fitted to these images; the one that
    was passed stays as it is.

    Args:
        images: Pictures of any size and mode, their files, or tensors of shape (3, H, W), float
            in [0, 1] or uint8. Each is cropped as the model would crop it, after training's way
            of reading it: not turned by its EXIF orientation, and without its transparency.
        strategies: Each by the title of its column.
        model_input: Image size, patch size and normalization; None means 224 px in patches of 16.
        model: A trained OpenCLIP model for strategies that look at more than pixels: its patch
            embeddings, once `progress` > 0, and its attention.
        progress: Completed share of the masked training steps, in [0, 1].
        stages: Draw the steps of every PGS strategy before its column.
        names: Captions of the originals; None leaves them out.
        seed: Of the random draw, which is the same for every strategy.
        max_side: Pixels that a file of the figure can have on a side; None is any number.

    Returns:
        One row per image: the original, then what each strategy keeps, with its mask ratio. With
        `stages`, every further PGS strategy has rows of its own below.

    Raises:
        ValueError: If images or strategies are not of these kinds, there is no image, `names` are
            not as many as `images`, a strategy needs a model and there is none, `stages` are asked
            for without a PGS strategy, an image cannot be read, or the figure could have more than
            `MAX_FIGURE_PIXELS` or `max_side`.
    """
    view = View(ModelInput() if model_input is None else model_input, model, progress)
    options: dict[str, Any] = {"stages": stages, "names": names, "seed": seed}
    blocks = mask_columns(images, strategies, view, max_side=max_side, **options)
    figures = [draw_figure(columns) for columns in blocks]
    size = (max(part.width for part in figures), sum(part.height for part in figures))
    figure, y = Image.new("RGB", size, PAPER), 0
    for part in figures:
        figure.paste(part, (0, y))
        y += part.height
    return figure


def mask_columns(
    images: Sequence[Image.Image | Tensor | str | Path],
    strategies: Mapping[str, MaskingStrategy],
    view: View,
    *,
    stages: bool = False,
    names: Sequence[str] | None = None,
    seed: int = 0,
    max_side: int | None = None,
) -> list[list[Column]]:
    """Draw the columns of `draw_masks`, which says what is taken, given and raised.

    Those of its further rows are a list of their own.
    """
    # A text is a sequence, too, and a tensor is none.
    if isinstance(images, str) or not isinstance(images, (Sequence, Tensor)):
        raise ValueError(f"images must be a list of images, got {type(images).__name__}")
    if not isinstance(strategies, Mapping):
        raise ValueError(
            "strategies must be a mapping, each by the title of its column, got "
            f"{type(strategies).__name__}"
        )
    if len(images) == 0:
        raise ValueError("there is no image to draw")
    for strategy in strategies.values():
        if not isinstance(strategy, MaskingStrategy):
            raise ValueError(f"a strategy must be a MaskingStrategy, got {strategy!r}")
    names = [""] * len(images) if names is None else names
    if len(names) != len(images):
        raise ValueError(f"names must be as many as images, {len(images)}, got {len(names)}")
    staged = [one for one in strategies.values() if stages and isinstance(one, PGSMasking)]
    if stages and not staged:
        raise ValueError(f"stages are those of pgs, which is not among {', '.join(strategies)}")
    model_input = view.model_input
    scale = math.ceil(PANEL_SIZE / min(model_input.image_size))
    if staged:
        scale = max(scale, math.ceil(_CELL_SIZE / min(model_input.patch_size)))
    height, width = (scale * side for side in model_input.image_size)
    num_columns = len(strategies) + sum(3 + strategy.options.edges for strategy in staged)
    num_blocks = max(1, len(staged))
    num_pictures = len(images) * (num_columns + num_blocks)
    if height * width * num_pictures > MAX_FIGURE_PIXELS:
        raise ValueError(
            f"the figure would be {num_pictures} pictures of {height} x {width} pixels, more than "
            "programs open; draw fewer or smaller images"
        )
    block_height, most_width = most_sides((height, width), len(images), 1 + num_columns)
    most_height = num_blocks * block_height
    if max_side is not None and max(most_height, most_width) > max_side:
        raise ValueError(
            f"the figure can have {most_height} x {most_width} pixels, more than the {max_side} "
            "that its format takes on a side; draw fewer images, or name a .png"
        )

    crops = [model_input.crop(read_image(image)) for image in images]
    enlarged = torch.stack([pil_to_tensor(crop.resize((width, height))) for crop in crops])
    enlarged = enlarged.float() / 255
    pixels = model_input.normalize(crops)
    num_rows, num_patches_across = model_input.grid_size
    noise_BN = seeded_noise(len(crops), num_rows * num_patches_across, seed=seed)
    original = Column("original", _panels(enlarged, names))
    blocks = [[original]]
    for title, strategy in strategies.items():
        inputs = replace(view.inputs(pixels, strategy), noise=noise_BN)
        legend, columns = None, blocks[0]
        if stages and isinstance(strategy, PGSMasking):
            if strategy is not staged[0]:
                columns = [original]
                blocks.append(columns)
            found = pgs_stages(strategy, inputs)
            columns += stage_columns(strategy, found, enlarged, model_input.grid_size)
            legend = kept_legend(strategy, found)
        with torch.no_grad():
            selection = fit_strategy(strategy, [inputs], progress=view.progress)(inputs)
        mask_ratios = 1 - selection.kept_counts() / inputs.num_patches
        captions = [f"{mask_ratio:.2f} masked" for mask_ratio in mask_ratios.tolist()]
        kept = paint_kept(enlarged, selection, (height // num_rows, width // num_patches_across))
        columns.append(Column(title, _panels(kept, captions), legend))
    return blocks


def _panels(pixels: Tensor, captions: Sequence[str]) -> list[Panel]:
    return list(zip(map(to_pil_image, pixels), captions, strict=True))


def run_masks(args: argparse.Namespace) -> None:
    """Draw the figure and say where it is.

    Raises:
        ValueError: If an option or an image is wrong, or the figure cannot be written.
        OSError: If the disk is full.
    """
    output: Path = args.output
    ending = output.suffix.lower()
    if ending not in image_endings() | {".pdf"}:
        raise ValueError(f"the output must end in .png, .jpg or the like, got {output}")
    kind = Image.registered_extensions()[ending]
    if kind != "PDF" and output.parent.resolve() in (Path(path).resolve() for path in args.images):
        raise ValueError(
            f"the output {output} must not be in a folder of the images, as the next call would "
            "find it there"
        )
    check_writable(output)
    ratios = {"mask_ratio": args.mask_ratio, "mask_ratio_min": args.mask_ratio_min}
    specs = parse_specs(args.maskings, **ratios)
    strategies = {spec.title: spec.build(**ratios) for spec in specs}
    view = read_view(args, strategies.values())
    paths = list_images(args.images)
    if output.resolve() in (path.resolve() for path in paths):
        raise ValueError(f"the output {output} is one of the images")
    figure = draw_masks(
        paths,
        strategies,
        model_input=view.model_input,
        model=view.model,
        progress=view.progress,
        stages=args.stages,
        names=[path.stem for path in paths],
        seed=args.seed,
        max_side=_MAX_SIDES.get(kind),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(regular_file(output)) as file:
        figure.save(file, kind)
    sys.stdout.write(f"{output}\n")
