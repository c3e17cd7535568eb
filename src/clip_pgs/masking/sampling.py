"""Random numbers, the choice of the highest scores, and patches as they lie in an image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional

from clip_pgs.masking.strategy import PatchInputs, PatchSelection

# About 2 MB of float32, what a core's own cache holds.
_BLOCK = 2**19
# The odd number nearest to 2**24 over the golden ratio: its multiples modulo 2**24 lie evenly.
_MULTIPLIER = 10_368_889


def draw_noise(inputs: PatchInputs, generator: Generator | None) -> Tensor:
    """Return one uniform number per patch, in [0, 1), shape (B, N), float32.

    `inputs.noise` is returned where given, and nothing is drawn.
    """
    if inputs.noise is not None:
        return inputs.noise
    size = (inputs.batch_size, inputs.num_patches)
    if generator is None:
        # With a generator, also with None, a compiled model cannot draw for batches that vary.
        return torch.rand(size, device=inputs.device, dtype=torch.float32)
    return torch.rand(size, generator=generator, device=inputs.device, dtype=torch.float32)


def second_draw(noise: Tensor) -> Tensor:
    """Derive further uniform numbers in [0, 1) from given ones, of the same shape.

    A number's 24 bits are multiplied by a constant, modulo 2**24 (Knuth's multiplicative hashing,
    The Art of Computer Programming 3, 6.4). That only reorders all the numbers of 24 bits, so that
    the result is as uniform, and tells nothing about the size of what it was made of.
    """
    bits = (noise * 2**24).long()
    return (bits * _MULTIPLIER % 2**24).to(noise.dtype) / 2**24


def image_draw(noise: Tensor) -> Tensor:
    """Derive one uniform number in [0, 1) per image from those of its patches, shape (B, 1).

    The sum of independent uniform numbers, less its whole part, is uniform, and tells nothing about
    any of them or about all but one.
    """
    bits_B1 = (noise * 2**24).long().sum(dim=1, keepdim=True)
    return (bits_B1 % 2**24).to(noise.dtype) / 2**24


def gumbel(noise: Tensor) -> Tensor:
    """Turn uniform numbers in [0, 1) into standard Gumbel ones of the same shape."""
    # log(0) would be -inf; the smallest normal float32 stands for 0.
    return -(-noise.clamp_min(torch.finfo(noise.dtype).tiny).log()).log()


def select_top(scores: Tensor, *, num_keep: int) -> PatchSelection:
    """Keep the `num_keep` patches with the highest scores; ties go to the lower index.

    Args:
        scores: Shape (B, N).
        num_keep: Patches kept per image, in [1, N].
    """
    order_BN = scores.sort(dim=1, descending=True, stable=True).indices
    return PatchSelection(index=order_BN[:, :num_keep].sort(dim=1).values)


def mask_top(scores: Tensor, *, num_mask: int) -> PatchSelection:
    """Mask the `num_mask` patches with the highest scores; ties go to the lower index.

    Args:
        scores: Shape (B, N).
        num_mask: Patches masked per image, in [0, N - 1].
    """
    order_BN = scores.sort(dim=1, descending=True, stable=True).indices
    return PatchSelection(index=order_BN[:, num_mask:].sort(dim=1).values)


def mask_top_counts(scores: Tensor, *, num_mask: Tensor, num_mask_min: int) -> PatchSelection:
    """Mask, in each image, its own number of the highest scores; ties go to the lower index.

    Args:
        scores: Shape (B, N).
        num_mask: Patches masked in each image, at least `num_mask_min`. Shape (B,), int64.
        num_mask_min: Lower bound of `num_mask`; it alone sets the number of slots.

    Returns:
        Selection with K = N - num_mask_min slots and `valid`.
    """
    num_patches = scores.shape[1]
    order_BN = scores.sort(dim=1, descending=True, stable=True).indices
    position_N = torch.arange(num_patches, device=scores.device)
    # A masked patch gets a position past the end, so that sorting puts kept ones first.
    position_BN = torch.where(position_N < num_mask[:, None], num_patches, order_BN)
    slots_BK = position_BN.sort(dim=1).values[:, : num_patches - num_mask_min]
    valid_BK = slots_BK < num_patches
    last_B = valid_BK.sum(dim=1, keepdim=True) - 1
    index_BK = torch.where(valid_BK, slots_BK, slots_BK.gather(1, last_B))
    return PatchSelection(index=index_BK, valid=valid_BK)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Return float64, where halves fall as in Python, or float32 on Apple's GPUs, which lack it."""
    return torch.float32 if device.type == "mps" else torch.float64


def share_at_random(
    scores: Tensor, noise: Tensor, *, num_mask: int | Tensor, random_share: float | Tensor
) -> Tensor:
    """Change scores so that a share of the patches that stay is drawn at random.

    Of the K patches that an image keeps, `round((1 - random_share) * K)` remain those with the
    lowest scores. The others are drawn uniformly from all patches but these.

    Args:
        scores: Shape (B, N).
        noise: Uniform numbers in [0, 1), shape (B, N), float32. The draw is independent of their
            order, which may have served before.
        num_mask: Patches masked in every image, or in each its own number: shape (B,), int64.
        random_share: Share of the kept patches that is drawn, in [0, 1]; a tensor has shape
            () or, for each image its own, (B, 1), and `exact_dtype`. The number 0 returns `scores`.

    Returns:
        What `mask_top` or `mask_top_counts` takes, with the same `num_mask`. Shape (B, N).
    """
    if not isinstance(random_share, Tensor) and random_share == 0:
        return scores
    num_patches = scores.shape[1]
    num_keep = num_patches - num_mask
    if isinstance(num_keep, Tensor):
        num_keep = num_keep[:, None].to(exact_dtype(scores.device))
    num_lowest = (1 - random_share) * num_keep
    num_lowest = num_lowest.round() if isinstance(num_lowest, Tensor) else round(num_lowest)
    order_BN = scores.sort(dim=1, descending=True, stable=True).indices
    rank_BN = order_BN.argsort(dim=1)
    return torch.where(rank_BN >= num_patches - num_lowest, -1.0, second_draw(noise))


def patchify(pixels: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into flattened patches.

    Args:
        pixels: Shape (B, C, H, W).
        patch_size: (height, width) of a patch, dividing H and W.

    Returns:
        Patches in raster order, each its C * height * width values. Shape (B, N, C * h * w).
    """
    batch_size, channels, *image_size = pixels.shape
    patch_height, patch_width = patch_size
    rows, columns = image_size[0] // patch_height, image_size[1] // patch_width
    cells = pixels.reshape(batch_size, channels, rows, patch_height, columns, patch_width)
    # No -1: of a batch without images nothing could be inferred.
    width = channels * patch_height * patch_width
    return cells.permute(0, 2, 4, 1, 3, 5).reshape(batch_size, rows * columns, width)


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
        fill: Value of a masked pixel; 0.5 is mid-gray for images in [0, 1].

    Returns:
        Images of the same shape and dtype. What lies beyond the last whole patch, which no model
        sees, is painted too.
    """
    height, width = pixels.shape[-2:]
    rows, columns = height // patch_size[0], width // patch_size[1]
    keep_mask = kept_patches(selection, rows * columns).reshape(-1, 1, rows, columns)
    keep_mask = keep_mask.repeat_interleave(patch_size[0], 2).repeat_interleave(patch_size[1], 3)
    keep_mask = functional.pad(
        keep_mask, (0, width - keep_mask.shape[3], 0, height - keep_mask.shape[2])
    )
    return torch.where(keep_mask, pixels, pixels.new_tensor(fill))


def grid_coordinates(grid_size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and column of every patch in raster order, two of shape (N,), int64."""
    position_N = torch.arange(grid_size[0] * grid_size[1], device=device)
    return position_N // grid_size[1], position_N % grid_size[1]


def log_center_weight(
    grid_size: tuple[int, int], device: torch.device, *, sigma: float = 0.2
) -> Tensor:
    """Weigh patches by a Gaussian around the middle of the image, in logarithm.

    Args:
        grid_size: (h, w) of the grid.
        device: Where the result lies.
        sigma: Standard deviation as a share of each side.

    Returns:
        Logarithms at the centers of the patches, at most 0, shape (N,), float32.
    """
    row_N, column_N = grid_coordinates(grid_size, device)
    y_N = (row_N + 0.5) / grid_size[0] - 0.5
    x_N = (column_N + 0.5) / grid_size[1] - 0.5
    return -(y_N.square() + x_N.square()) / (2 * sigma**2)


@contextmanager
def without_tf32() -> Iterator[None]:
    """Compute products in float32 on a GPU, whose TF32 keeps three digits, inside a `with` block.

    A model that is compiled inside does not notice.
    """
    matmul: Any = torch.backends.cuda.matmul
    off: Any
    try:
        name, before, off = "allow_tf32", matmul.allow_tf32, False
    except RuntimeError:  # where torch's newer setting was used
        name, before, off = "fp32_precision", matmul.fp32_precision, "ieee"
    setattr(matmul, name, off)
    try:
        yield
    finally:
        setattr(matmul, name, before)


def full_precision(tensor: Tensor) -> AbstractContextManager:
    """Return a context without autocast and TF32 on a tensor's device.

    Where a model is compiled, TF32 is as it is for the rest of the model.
    """
    if tensor.is_meta:  # which knows no autocast
        return nullcontext()
    if tensor.is_cuda and not torch.compiler.is_compiling():
        return _eager_float32()
    return torch.autocast(tensor.device.type, enabled=False)


@contextmanager
def _eager_float32() -> Iterator[None]:
    with torch.autocast("cuda", enabled=False), without_tf32():
        yield


def in_blocks(compute: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
    """Compute something for each image of a batch by itself.

    Selection reads and writes an image several times for little arithmetic. Where memory is slow,
    that takes several times as long on a whole batch as on a few images; elsewhere, and inside a
    compiled model, the batch stays whole.

    Args:
        compute: Takes tensors of B images and returns one of them, without mixing images.
        *tensors: What it takes, each of shape (B, ...); the first one sets the size of a block.
            None is passed on.

    Returns:
        What `compute` returns for the whole batch.
    """
    first = tensors[0]
    assert first is not None
    if first.device.type != "cpu" or torch.compiler.is_compiling() or first.numel() <= _BLOCK:
        return compute(*tensors)
    num_images = max(1, _BLOCK * len(first) // first.numel())
    blocks = [len(first) * [None] if t is None else t.split(num_images) for t in tensors]
    return torch.cat([compute(*block) for block in zip(*blocks, strict=False)])
