"""Images with foreground masks, and which of their patches are foreground."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from clip_pgs.inspection.images import list_images, open_image
from clip_pgs.inspection.model_input import ModelInput
from clip_pgs.masking.sampling import patchify

MASK_ENDING = ".png"


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
    pairs = [(path, masks / f"{path.stem}{MASK_ENDING}") for path in paths]
    users: dict[Path, Path] = {}
    for image, mask in pairs:
        if not mask.is_file():
            raise ValueError(f"the image {image} has no mask {mask}")
        if mask in users:
            raise ValueError(f"the images {users[mask]} and {image} have the same mask {mask}")
        users[mask] = image
    return pairs


def read_foreground(
    pairs: Sequence[tuple[Path, Path]],
    model_input: ModelInput,
    *,
    progress: Callable[[], object] | None = None,
) -> ForegroundImages:
    """Read images and their masks, and crop both alike.

    Args:
        pairs: Image and mask files. In a mask, any value but 0 is foreground.
        model_input: How the model crops images and cuts them into patches.
        progress: Called after every image.

    Raises:
        ValueError: If a file cannot be read, a mask has another size than its image, or no image
            has a foreground patch.
    """
    crops, foreground = [], []
    for image_path, mask_path in pairs:
        image, mask = open_image(image_path), open_image(mask_path)
        if mask.size != image.size:
            raise ValueError(
                f"the mask {mask_path} is {mask.width} x {mask.height} pixels, "
                f"its image {image.width} x {image.height}"
            )
        is_foreground_N = _foreground_patches(mask, model_input)
        if is_foreground_N.any():
            crops.append(model_input.crop(image))
            foreground.append(is_foreground_N)
        if progress is not None:
            progress()
    if not crops:
        raise ValueError(
            f"none of the {len(pairs)} masks covers more than half of a patch; "
            "in a mask, any value but 0 is foreground"
        )
    return ForegroundImages(crops, torch.stack(foreground), len(pairs) - len(crops))


def _foreground_patches(mask: Image.Image, model_input: ModelInput) -> Tensor:
    values = np.asarray(mask)
    if values.ndim == 3:
        # The last of two or four bands says how opaque a pixel is.
        bands = values.shape[2] - (values.shape[2] in (2, 4))
        values = values[:, :, :bands].max(axis=2)
    height, width = model_input.image_size
    white = Image.fromarray((values != 0).astype(np.uint8) * 255)
    fitted = ImageOps.fit(white, (width, height), Image.Resampling.BILINEAR)
    share = pil_to_tensor(fitted)[None].float() / 255
    return patchify(share, model_input.patch_size).mean(dim=2)[0] > 0.5
