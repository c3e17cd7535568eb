"""Measure the mask ratio of adaptive PGS on one's own photographs, over training progress.

    python scripts/calibrate_threshold.py NAME=PATTERN... [--model MODEL] [--image-size PIXELS]

A pattern is a glob of images or of tar files with images. MODEL is the name of an OpenCLIP model,
whose weights are random then, a run folder or a checkpoint; its own transform prepares the images,
and its own tower cuts and embeds them. For each image set, progress and threshold: mean mask
ratio, its spread between images, and the share of images at either bound, here 0.3 and 0.5. The
defaults of `pgs` were found with it; see docs/threshold.md.
"""

from __future__ import annotations

import argparse
import glob
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn

from clip_pgs import create_masking
from clip_pgs.common import explained
from clip_pgs.data.decoding import open_image, to_rgb
from clip_pgs.data.tar import read_shard
from clip_pgs.evaluation.models import load_model
from clip_pgs.integrations.open_clip import apply_masking, num_patches, set_masking_progress
from clip_pgs.masking.pgs import calibrated_threshold
from clip_pgs.masking.strategy import mask_count

MASK_RATIO, MASK_RATIO_MIN = 0.5, 0.3


def read_images(pattern: str) -> Iterator[tuple[str, bytes]]:
    """Yield the image files that a glob pattern names, also those inside tar files, by name."""
    for path in sorted(glob.glob(pattern)):
        if path.endswith(".tar"):
            for pair in read_shard(path):
                if getattr(pair, "image", None):
                    yield f"{pair.key} of {path}", pair.image
        else:
            yield path, Path(path).read_bytes()


def load_images(pattern: str, transform: Callable[[Any], Tensor], limit: int) -> Tensor:
    """Return the first `limit` images as a model receives them, (B, 3, H, W).

    Raises:
        ValueError: If there is none, or one cannot be read.
    """
    images = []
    for name, content in read_images(pattern):
        with explained(name):
            images.append(transform(to_rgb(open_image(content))))
        if len(images) == limit:
            break
    if not images:
        raise ValueError(f"no image at {pattern}")
    return torch.stack(images)


def load(source: str, image_size: int | None) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """Return a model, masked in eval mode, and the transform of its images.

    Raises:
        ValueError: If there is no such model, or its image tower cannot be masked.
    """
    if Path(source).exists():
        if image_size is not None:
            raise ValueError(f"--image-size goes with the name of a model, got {source}")
        loaded = load_model(source)
        model, transform = loaded.model, loaded.transform
    elif source in open_clip.list_models():
        torch.manual_seed(0)
        model, _, transform = open_clip.create_model_and_transforms(
            source, force_image_size=image_size
        )
    else:
        raise ValueError(f"no run or checkpoint at {source}, and no OpenCLIP model")
    return apply_masking(model.eval(), "pgs", when="always"), transform


@torch.no_grad()
def mask_ratios(
    model: nn.Module, images: Tensor, *, progress: float, thresholds: list[float]
) -> Tensor:
    """Return the mask ratio of every image at each threshold, (B, thresholds)."""
    tower: Any = model.visual
    set_masking_progress(model, progress)
    bounds = {"mask_ratio": MASK_RATIO, "mask_ratio_min": MASK_RATIO_MIN}
    strategies = [create_masking("pgs", threshold=value, **bounds) for value in thresholds]
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for batch in images.split(50):
        inputs = tower.masking.inputs(batch, tower.embed_patches(batch))
        noise = torch.rand(len(batch), inputs.num_patches, generator=generator)
        _, candidates, scores = strategies[0].steps(inputs, noise)
        found = [
            strategy.select(scores, candidates, noise=noise, progress=progress).kept_counts()
            for strategy in strategies
        ]
        ratios.append(1 - torch.stack(found, dim=1) / inputs.num_patches)
    return torch.cat(ratios)


def main() -> None:
    """Print one row per image set, progress and threshold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="NAME=PATTERN")
    parser.add_argument("--model", default="ViT-B-16", help="OpenCLIP name, run or checkpoint")
    parser.add_argument("--image-size", type=int, help="of a model by name, in pixels")
    parser.add_argument("--limit", type=int, default=200, help="images per set")
    parser.add_argument("--progress", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--thresholds", type=float, nargs="+", help="default: the calibrated one")
    options = parser.parse_args()
    try:
        model, transform = load(options.model, options.image_size)
        image_sets = {
            name: load_images(pattern, transform, options.limit)
            for name, _, pattern in (source.partition("=") for source in options.sources)
        }
    except ValueError as error:
        print(f"calibrate_threshold: {error}", file=sys.stderr)
        sys.exit(2)
    count = num_patches(model)
    fewest, most = (mask_count(count, ratio) / count for ratio in (MASK_RATIO_MIN, MASK_RATIO))
    print("set,images,patches,progress,threshold,mean,sd,at_lower_bound,at_upper_bound")
    for name, images in image_sets.items():
        for progress in options.progress:
            thresholds = options.thresholds or [calibrated_threshold(progress, num_patches=count)]
            found = mask_ratios(model, images, progress=progress, thresholds=thresholds)
            for threshold, ratios in zip(thresholds, found.unbind(1), strict=True):
                low = (ratios < fewest + 1e-6).float().mean()
                high = (ratios > most - 1e-6).float().mean()
                print(
                    f"{name},{len(images)},{count},{progress},{threshold:.3f},{ratios.mean():.3f},"
                    f"{ratios.std():.3f},{low:.2f},{high:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
