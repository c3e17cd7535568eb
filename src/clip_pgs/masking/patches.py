"""Cut images into patches and gather the selected ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from clip_pgs.masking.types import PatchSelection


def patchify(pixels: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into flattened patches.

    Args:
        pixels: Shape (B, C, H, W).
        patch_size: (height, width) of a patch, dividing H and W.

    Returns:
        Patches in raster order, each its C * height * width values. Shape (B, N, C * h * w).
    """
    batch_size, channels, height, width = pixels.shape
    patch_height, patch_width = patch_size
    rows, columns = height // patch_height, width // patch_width
    cells = pixels.reshape(batch_size, channels, rows, patch_height, columns, patch_width)
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, rows * columns, -1)


def gather_tokens(tokens: Tensor, selection: PatchSelection) -> Tensor:
    """Gather the selected tokens.

    Args:
        tokens: One token per patch. Shape (B, N, D).
        selection: Which to keep; index of shape (B, K).

    Returns:
        Tokens of shape (B, K, D).
    """
    index_BKD = selection.index[:, :, None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, index_BKD)


def kept_patches(selection: PatchSelection, num_patches: int) -> Tensor:
    """Return which patches a selection keeps, as booleans of shape (B, N)."""
    keep_mask_BN = torch.zeros(
        (selection.index.shape[0], num_patches), dtype=torch.bool, device=selection.index.device
    )
    # A padding slot repeats a kept patch, so that writing True there changes nothing.
    return keep_mask_BN.scatter(1, selection.index, True)


def paint_kept(
    pixels: Tensor, selection: PatchSelection, patch_size: tuple[int, int], *, fill: float = 0.5
) -> Tensor:
    """Paint the masked patches of images in one flat value.

    Args:
        pixels: Images to draw on, usually in [0, 1]. Shape (B, C, H, W).
        selection: The patches that stay visible.
        patch_size: (height, width) of a patch.
        fill: Value of a masked pixel; 0.5 is mid-grey for images in [0, 1].

    Returns:
        Images of the same shape and dtype. What lies beyond the last whole patch, which no model
        sees, is painted too.
    """
    height, width = pixels.shape[-2:]
    rows, columns = height // patch_size[0], width // patch_size[1]
    keep_mask = kept_patches(selection, rows * columns).reshape(-1, 1, rows, columns)
    keep_mask = keep_mask.repeat_interleave(patch_size[0], 2).repeat_interleave(patch_size[1], 3)
    keep_mask = pad(keep_mask, (0, width - keep_mask.shape[3], 0, height - keep_mask.shape[2]))
    return torch.where(keep_mask, pixels, pixels.new_tensor(fill))
