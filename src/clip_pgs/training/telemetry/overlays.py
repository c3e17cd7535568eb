"""Pictures of what the masking keeps of a few training images, the same throughout a run."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import torch
from open_clip import CLIP
from torch import Tensor
from torchvision.utils import make_grid, save_image

from clip_pgs.common import atomic_file
from clip_pgs.integrations.open_clip import (
    last_selection,
    num_patches,
    patch_size,
    pixel_dtype,
    set_masking_noise,
)
from clip_pgs.masking.sampling import paint_kept
from clip_pgs.training.seeding import step_noise

_logger = logging.getLogger(__name__)
NUM_IMAGES = 8
_IMAGES_NAME = "images.pt"


def fixed_images(folder: Path, candidates: Tensor) -> Tensor:
    """Return the images a run draws masks on: the first ones it ever saw.

    Args:
        folder: The run's folder of pictures, where the images are kept for a resumed run.
        candidates: Training images as the model receives them. Shape (B, 3, H, W).

    Returns:
        Up to 8 images on the device of the candidates, float32.

    Raises:
        OSError: If they cannot be kept.
    """
    path = folder / _IMAGES_NAME
    images = _read_images(path) if path.is_file() else None
    if images is None:
        images = candidates[:NUM_IMAGES].float().cpu()
        folder.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        torch.save(images, content)
        # Not by torch, which tells of a full disk as of a wrong position in the file.
        with atomic_file(path) as file:
            file.write(content.getbuffer())
    return images.to(candidates.device)


def _read_images(path: Path) -> Tensor | None:
    """Return the images that an earlier launch chose, None where the file is damaged."""
    try:
        images = torch.load(path, weights_only=True)
    # What a damaged file makes torch raise depends on where the damage lies.
    except Exception as error:
        _logger.warning("%s cannot be read: %s; it begins anew", path, type(error).__name__)
        return None
    is_batch = isinstance(images, Tensor) and images.ndim == 4
    return images if is_batch else None


def draw_masks(model: CLIP, images: Tensor, *, seed: int) -> Tensor:
    """Draw images above what the masking keeps of them at its present progress.

    Args:
        model: The plain masked model; its mode, its random streams and its weights stay as they
            are, and the noise given to it is forgotten.
        images: As the model receives them. Shape (B, 3, H, W).
        seed: The same seed gives the same masks of the same scores.

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
    with torch.no_grad(), torch.random.fork_rng(devices):
        tower.train()
        tower(images.to(pixel_dtype(model)))
        tower.train(was_training)
    set_masking_noise(model, None)
    selection = last_selection(model)
    assert selection is not None

    mean, std = (images.new_tensor(v)[:, None, None] for v in (tower.image_mean, tower.image_std))
    pixels = (images * std + mean).clamp(0, 1)
    painted = paint_kept(pixels, selection, patch_size(model))
    return make_grid(torch.cat([pixels, painted]).cpu(), nrow=len(images), pad_value=1.0)


def save_picture(picture: Tensor, path: Path) -> None:
    """Write a picture of shape (3, H, W) in [0, 1] as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(picture, path)
