"""Images and strategy inputs that the tests share."""

import torch

from clip_pgs import PatchInputs


def smooth_images(batch_size=2, *, height=56, width=56, seed=0):
    """Return images with regions, edges and a little noise, shape (B, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(batch_size, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(
        coarse, size=(height, width), mode="bilinear", align_corners=False
    )
    blocks = torch.nn.functional.interpolate(
        torch.randn(batch_size, 3, 5, 3, generator=generator), size=(height, width)
    )
    noise = torch.randn(batch_size, 3, height, width, generator=generator)
    return smooth + (blocks > 0.8) * blocks + 0.02 * noise


def make_inputs(batch_size=2, *, grid_size=(7, 7), patch_size=8, progress=0.0, seed=0, **changes):
    """Return inputs for a strategy, with tokens of width 24 and a teacher's attention."""
    rows, columns = grid_size
    pixels = smooth_images(
        batch_size, height=rows * patch_size, width=columns * patch_size, seed=seed
    )
    tokens = torch.randn(
        batch_size, rows * columns, 24, generator=torch.Generator().manual_seed(seed + 1)
    )
    attention = torch.rand(
        batch_size, rows * columns, generator=torch.Generator().manual_seed(seed + 2)
    )
    fields = {
        "pixels": pixels,
        "tokens": tokens,
        "progress": progress,
        "attention": attention,
        **changes,
    }
    return PatchInputs(patch_size=patch_size, **fields)


def square_on_gradient(*, size=112, side=32, top=32, left=48):
    """Return one image, a textured square on a smooth slope, and its foreground (H, W)."""
    slope = torch.linspace(-1, 1, size).expand(3, size, size).clone()
    foreground = torch.zeros(size, size, dtype=torch.bool)
    foreground[top : top + side, left : left + side] = True
    texture = torch.randn(3, size, size, generator=torch.Generator().manual_seed(5))
    return torch.where(foreground, texture, slope)[None], foreground
