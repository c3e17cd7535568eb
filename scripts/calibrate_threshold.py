"""Measure the mask ratio of adaptive PGS on one's own photographs, over training progress.

    python scripts/calibrate_threshold.py NAME=PATTERN... [--embedding CHECKPOINT]

A pattern is a glob of images or of tar files with images. For each image set, progress and
threshold: mean mask ratio, its spread between images, and the share of images at either bound.
The defaults of `pgs` were found with it; see docs/threshold.md.
"""

from __future__ import annotations

import argparse
import glob
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from clip_pgs import PatchInputs, create_masking
from clip_pgs.masking.pgs import calibrated_threshold

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
SIZE, PATCH_SIZE, WIDTH = 224, 16, 768


def read_images(pattern: str) -> Iterator[bytes]:
    """Yield the image files that a glob pattern names, also those inside tar files."""
    for path in sorted(glob.glob(pattern)):
        if not path.endswith(".tar"):
            yield Path(path).read_bytes()
            continue
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name.lower().endswith(IMAGE_ENDINGS):
                    yield archive.extractfile(member).read()


def load_images(pattern: str, limit: int) -> Tensor:
    """Return the first `limit` images as a model receives them, (B, 3, 224, 224)."""
    transform = v2.Compose(
        [
            v2.Resize(SIZE, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(SIZE),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(OPENAI_DATASET_MEAN, OPENAI_DATASET_STD),
        ]
    )
    images = []
    for content in read_images(pattern):
        images.append(transform(Image.open(io.BytesIO(content)).convert("RGB")))
        if len(images) == limit:
            break
    return torch.stack(images)


def patch_embedding(checkpoint: Path | None) -> Tensor:
    """Return the weight of a patch embedding, (D, 3, 16, 16): a trained one or a fresh one."""
    if checkpoint is None:
        torch.manual_seed(0)
        return torch.nn.Conv2d(3, WIDTH, PATCH_SIZE, PATCH_SIZE, bias=False).weight.detach()
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state_dict = content.get("state_dict", content)
    return next(value for key, value in state_dict.items() if key.endswith("visual.conv1.weight"))


def mask_ratios(images: Tensor, weight: Tensor, *, progress: float, threshold: float) -> Tensor:
    """Return the mask ratio of every image, (B,)."""
    strategy = create_masking("pgs", mask_ratio=0.5, mask_ratio_min=0.3, threshold=threshold)
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for batch in images.split(50):
        tokens = torch.nn.functional.conv2d(batch, weight, stride=PATCH_SIZE)
        inputs = PatchInputs(
            batch, PATCH_SIZE, tokens=tokens.flatten(2).transpose(1, 2), progress=progress
        )
        kept = strategy(inputs, generator=generator).kept_counts()
        ratios.append(1 - kept / inputs.num_patches)
    return torch.cat(ratios)


def main() -> None:
    """Print one row per image set, progress and threshold."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", metavar="NAME=PATTERN")
    parser.add_argument("--embedding", type=Path, help="checkpoint with a 16-pixel patch embedding")
    parser.add_argument("--limit", type=int, default=200, help="images per set")
    parser.add_argument("--progress", type=float, nargs="+", default=[0.0, 0.5, 1.0])
    parser.add_argument("--thresholds", type=float, nargs="+", help="default: the calibrated one")
    options = parser.parse_args()
    weight = patch_embedding(options.embedding)
    print("set,images,progress,threshold,mean,sd,at_lower_bound,at_upper_bound")
    for source in options.sources:
        name, _, pattern = source.partition("=")
        images = load_images(pattern, options.limit)
        for progress in options.progress:
            for threshold in options.thresholds or [calibrated_threshold(progress)]:
                ratios = mask_ratios(images, weight, progress=progress, threshold=threshold)
                low, high = (ratios < 0.3).float().mean(), (ratios >= 0.5).float().mean()
                print(
                    f"{name},{len(images)},{progress},{threshold:.3f},{ratios.mean():.3f},"
                    f"{ratios.std():.3f},{low:.2f},{high:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
