"""How much of annotated foregrounds each strategy keeps."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, fields, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from clip_pgs.files import check_writable, write_bytes, write_json, write_text
from clip_pgs.inspection.model_input import (
    ModelInput,
    StrategySpec,
    View,
    fit_strategy,
    list_images,
    parse_specs,
    read_image,
    read_view,
    seeded_noise,
)
from clip_pgs.masking.sampling import kept_patches, patchify
from clip_pgs.masking.strategy import check_mask_ratio
from clip_pgs.tables import Table, counted, csv_text

FILE_NAMES = ("kept.json", "kept.csv", "kept.png")
MASK_ENDING = ".png"

# EXIF orientations that turn or mirror a picture; cameras write others, too.
_TURNING = range(2, 9)
_CHUNK = 128  # images looked at together
_SHIFT = 0.006  # of a line's bars against the next one's, in mask ratio


@dataclass(frozen=True)
class ForegroundImages:
    """Images that have a foreground, cropped as a model receives them.

    Attributes:
        crops: Of B images.
        foreground: True for patches whose foreground takes more than half of their area, at least
            one in each image. Shape (B, N), bool.
        num_without: Images left out because no patch is foreground.
    """

    crops: list[Image.Image]
    foreground: Tensor
    num_without: int


@dataclass(frozen=True)
class Kept:
    """What a strategy keeps at a mask ratio.

    Attributes:
        masking: The strategy's title.
        mask_ratio: What was asked for.
        measured_ratio: Mean share of patches dropped.
        kept: Share of an image's foreground patches that is kept, mean over images and seeds.
        spread: Standard deviation over seeds of the mean over images; None for a single seed.
    """

    masking: str
    mask_ratio: float
    measured_ratio: float
    kept: float
    spread: float | None


# Images and their masks


def pair_masks(images: Sequence[str | Path], masks: str | Path) -> list[tuple[Path, Path]]:
    """Find the mask of each image: the PNG file of the same name, without ending, in a folder.

    Args:
        images: Image files, or folders of them. In the folder of the masks, PNG files are masks.
        masks: Folder of the masks.

    Raises:
        ValueError: If there is no such folder, no image, an image has no mask, or two images
            have the same one.
    """
    masks = Path(masks)
    if not masks.is_dir():
        raise ValueError(f"there is no folder of masks {masks}")
    folders = {path.resolve() for path in map(Path, images) if path.is_dir()}
    paths = list_images(images)
    folder = masks.resolve()
    if folder in folders:
        paths = [p for p in paths if p.suffix != MASK_ENDING or p.parent.resolve() != folder]
    if not paths:
        raise ValueError(f"there is no image beside the masks in {masks}")
    image_of: dict[Path, Path] = {}
    for path in paths:
        mask = masks / f"{path.stem}{MASK_ENDING}"
        if not mask.is_file():
            raise ValueError(f"the image {path} has no mask {mask}")
        if mask in image_of:
            raise ValueError(f"the images {image_of[mask]} and {path} have the same mask {mask}")
        image_of[mask] = path
    return [(path, mask) for mask, path in image_of.items()]


def read_foreground(
    pairs: Sequence[tuple[Path, Path]], model_input: ModelInput
) -> ForegroundImages:
    """Read images and their masks, and crop both alike.

    Args:
        pairs: Image and mask files. In a mask, any value but 0 is foreground; its alpha does not
            count.
        model_input: How the model crops images and cuts them into patches.

    Raises:
        ValueError: If a file cannot be read or has an EXIF orientation, a mask has another size
            than its image, or no image has a foreground patch.
    """
    crops, foreground = [], []
    for image_path, mask_path in tqdm(pairs, leave=False, disable=None):
        image, mask = read_image(image_path), read_image(mask_path)
        _check_orientation(image_path, image)
        _check_orientation(mask_path, mask)
        if mask.size != image.size:
            raise ValueError(
                f"the mask {mask_path} is {mask.width} x {mask.height} pixels, "
                f"its image {image.width} x {image.height}"
            )
        is_foreground_N = _foreground_patches(mask, model_input)
        if is_foreground_N.any():
            crops.append(model_input.crop(image))
            foreground.append(is_foreground_N)
    if not crops:
        raise ValueError(
            f"none of the {len(pairs)} masks covers more than half of a patch; "
            "in a mask, any value but 0 is foreground"
        )
    return ForegroundImages(crops, torch.stack(foreground), len(pairs) - len(crops))


def _check_orientation(path: Path, picture: Image.Image) -> None:
    orientation = None
    # Broken metadata turn no picture.
    with suppress(SyntaxError, ValueError):
        orientation = picture.getexif().get(ExifTags.Base.Orientation)
    if orientation in _TURNING:
        raise ValueError(
            f"{path} is shown turned by its EXIF orientation, {orientation}, and read as stored, "
            "as in training: whether image and mask fit is not known; save both as they are "
            "shown, without orientation"
        )


def _foreground_patches(mask: Image.Image, model_input: ModelInput) -> Tensor:
    values = np.asarray(mask)
    if values.ndim == 3:
        # The last of two or four bands says how opaque a pixel is.
        bands = values.shape[2] - (values.shape[2] in (2, 4))
        values = values[:, :, :bands].max(axis=2)
    white = Image.fromarray((values != 0).astype(np.uint8))
    share = pil_to_tensor(model_input.crop_mask(white))[None].float()
    return patchify(share, model_input.patch_size).mean(dim=2)[0] > 0.5


# The measurement


def measure_kept(
    images: ForegroundImages,
    specs: Sequence[StrategySpec],
    mask_ratios: Sequence[float],
    *,
    view: View,
    num_seeds: int = 20,
) -> list[Kept]:
    """Measure the share of foreground patches that strategies keep.

    Each seed draws one set of random numbers for all strategies and ratios. A strategy that
    training would calibrate (`cluster`) is fitted to these images, seeds and ratio.

    Args:
        images: With their foreground.
        specs: The strategies.
        mask_ratios: Each in [0, 1).
        view: How the strategies see the images.
        num_seeds: Seeds 0 to `num_seeds` - 1, at least 1.

    Returns:
        Strategies in their order, each with the ratios in theirs.

    Raises:
        ValueError: If an argument is out of its range, or a strategy needs a model.
    """
    if num_seeds < 1:
        raise ValueError(f"the number of seeds must be at least 1, got {num_seeds}")
    num_images, num_patches = images.foreground.shape
    noises = [seeded_noise(num_images, num_patches, seed=seed) for seed in range(num_seeds)]
    starts = range(0, num_images, _CHUNK)
    rows = []
    for spec, mask_ratio in tqdm(list(product(specs, mask_ratios)), leave=False, disable=None):
        strategy = spec.build(mask_ratio=mask_ratio)
        if mask_ratio == mask_ratios[0]:
            # What a strategy sees is the same at all ratios.
            chunks = (images.crops[start : start + _CHUNK] for start in starts)
            seen = [view.inputs(view.model_input.normalize(crops), strategy) for crops in chunks]
        draws = [
            [
                replace(one, noise=noise)
                for one, noise in zip(seen, noise_BN.split(_CHUNK), strict=True)
            ]
            for noise_BN in noises
        ]
        strategy = fit_strategy(strategy, chain.from_iterable(draws), progress=view.progress)
        with torch.no_grad():
            keep_mask_SBN = torch.stack(
                [
                    torch.cat([kept_patches(strategy(b), num_patches) for b in draw])
                    for draw in draws
                ]
            )
        inside_SB = (keep_mask_SBN & images.foreground).sum(2) / images.foreground.sum(1)
        kept_S = inside_SB.double().mean(1)
        spread = kept_S.std().item() if num_seeds > 1 else None
        dropped = (1 - keep_mask_SBN.double().mean((1, 2))).mean().item()
        rows.append(Kept(spec.title, mask_ratio, dropped, kept_S.mean().item(), spread))
    return rows


# The command


def run_kept(args: argparse.Namespace) -> None:
    """Measure, print the table and write the files.

    Raises:
        ValueError: If an option, an image or a mask is wrong, or a file cannot be written.
        OSError: If the disk is full.
    """
    for mask_ratio in args.mask_ratios:
        check_mask_ratio(mask_ratio)
    mask_ratios = list(dict.fromkeys(args.mask_ratios))
    specs = parse_specs(args.maskings)
    strategies = [spec.build(mask_ratio=ratio) for spec in specs for ratio in mask_ratios]
    view = read_view(args, strategies)
    if args.output is not None:
        # A picture there would be one more of the images, or take the place of one.
        given = {Path(path).resolve() for path in (*args.images, args.foreground)}
        if given & {path.resolve() for path in (args.output, args.output / "kept.png")}:
            raise ValueError(
                f"the output {args.output} must not be where images or masks are, as kept.png "
                "would be among them"
            )
    pairs = pair_masks(args.images, args.foreground)
    if args.output is not None:
        check_writable(*(args.output / name for name in FILE_NAMES))

    images = read_foreground(pairs, view.model_input)
    rows = measure_kept(images, specs, mask_ratios, view=view, num_seeds=args.seeds)
    num_images, num_patches = images.foreground.shape
    facts: dict[str, Any] = {
        "num_images": num_images,
        "num_without_foreground": images.num_without,
        "num_patches": num_patches,
        "foreground_share": images.foreground.double().mean().item(),
        "image_size": list(view.model_input.image_size),
        "patch_size": list(view.model_input.patch_size),
        "progress": view.progress,
        "num_seeds": args.seeds,
    }
    (height, width), (patch_height, patch_width) = facts["image_size"], facts["patch_size"]
    title = (
        f"{counted(num_images, 'image')} of {height} x {width} pixels in patches of "
        f"{patch_height} x {patch_width}, {counted(args.seeds, 'seed')}"
    )
    over = ", mean and standard deviation over seeds"
    without = f"; {images.num_without} without a foreground patch left out"
    sys.stdout.write(
        f"share of foreground patches kept{over if args.seeds > 1 else ''}\n"
        f"{title}, {facts['foreground_share']:.2f} of their patches foreground"
        f"{without if images.num_without else ''}\n\n{kept_table(rows)}"
    )
    if args.output is not None:
        content = {**facts, "results": [asdict(row) for row in rows]}
        write_json(args.output / "kept.json", content)
        header = [field.name for field in fields(Kept)]
        write_text(args.output / "kept.csv", csv_text(header, map(astuple, rows)))
        plot_kept(rows, args.output / "kept.png", title=title)
        sys.stdout.write(f"\n{args.output}: {', '.join(FILE_NAMES)}\n")


def kept_table(rows: Sequence[Kept]) -> str:
    """Return a table with a line per strategy and a column per mask ratio.

    Where a strategy drops another share than asked for, the measured ratio stands in brackets.
    """
    ratios = list(dict.fromkeys(row.mask_ratio for row in rows))
    lines: dict[str, list[str]] = {}
    for row in rows:
        cell = f"{row.kept:.3f}" + ("" if row.spread is None else f" +- {row.spread:.3f}")
        # One patch of 49 is 0.02: a ratio is met by rounding down to whole patches.
        if abs(row.measured_ratio - row.mask_ratio) > 0.02:
            cell += f" (drops {row.measured_ratio:.2f})"
        lines.setdefault(row.masking, [row.masking]).append(cell)
    return Table.of(["mask ratio", *map(str, ratios)], lines.values()).text()


def plot_kept(rows: Sequence[Kept], path: Path, *, title: str) -> None:
    """Draw a line per strategy, with bars of one standard deviation over seeds, into a PNG file.

    Args:
        rows: What was measured.
        path: File to write.
        title: Stands above.

    Raises:
        OSError: If the file cannot be written.
    """
    # It takes a second to import.
    from matplotlib.figure import Figure

    from clip_pgs import plots

    maskings = list(dict.fromkeys(row.masking for row in rows))
    ratios = sorted({row.mask_ratio for row in rows})
    with plots.plot_style():
        # The legend stands beside the lines and must not squeeze them.
        width = max(6.4, 4.4 + 0.08 * max(map(len, maskings)))
        drawing = Figure(figsize=(width, 4.0), layout="constrained")
        axes = drawing.subplots()
        plots.quiet_axis(axes)
        dropped_evenly = [1 - ratio for ratio in ratios]
        axes.plot(ratios, dropped_evenly, color=plots.MIDDLE, linestyle=":", label="no preference")
        for number, masking in enumerate(maskings):
            points = sorted((r.mask_ratio, r.kept, r.spread) for r in rows if r.masking == masking)
            x, y, spread = zip(*points, strict=True)
            # Side by side, since bars on one spot hide each other.
            shift = _SHIFT * (number - (len(maskings) - 1) / 2)
            axes.errorbar(
                [ratio + shift for ratio in x],
                y,
                yerr=None if None in spread else spread,
                markersize=5,
                linewidth=1.4,
                elinewidth=0.9,
                capsize=3,
                label=plots.legend_label(masking),
                **plots.look_of(number),
            )
        axes.set(xticks=ratios, xlabel="mask ratio", ylabel="share of foreground patches kept")
        axes.set_ylim(bottom=0)
        axes.set_title(title)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        write_bytes(path, plots.picture(drawing, "png"))
