"""Masks of filtered noise."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from clip_pgs import PatchInputs, create_masking, list_maskings
from clip_pgs.masking.sampling import kept_patches

SIDE = 16


def kept(color, *, sigma=1.0, batch_size=4, side=SIDE, seed=0):
    """Return the noise and which patches are kept, both (B, side, side)."""
    noise = torch.rand(batch_size, side * side, generator=torch.Generator().manual_seed(seed))
    strategy = create_masking("colormae", mask_ratio=0.75, color=color, sigma=sigma)
    inputs = PatchInputs(torch.zeros(batch_size, 3, 4 * side, 4 * side), 4, noise=noise)
    shape = (batch_size, side, side)
    return noise.reshape(shape), kept_patches(strategy(inputs), side * side).reshape(shape)


def filtered(white, color, sigma):
    """Filter one grid of noise as the paper writes it, by SciPy."""

    def blur(sigma):
        return gaussian_filter(white, sigma, mode="wrap", truncate=SIDE / 2 / sigma)

    band = blur(sigma) - blur(2 * sigma)
    low = blur(sigma)
    return {"red": low, "blue": white - low, "green": band, "purple": white - band}[color]


@pytest.mark.parametrize("color", ["green", "red", "blue", "purple"])
def test_what_stays_is_the_top_quarter_of_the_filtered_noise(color):
    noise, is_kept = kept(color)
    for white, mask in zip(noise.double().numpy(), is_kept.numpy(), strict=True):
        numbers = filtered(white, color, 1.0)
        assert np.array_equal(mask, numbers >= np.sort(numbers.ravel())[-SIDE * SIDE // 4])


def test_low_frequencies_make_blobs_and_high_ones_scatter():
    def neighbors(color):
        """Return how often the patch to the right of a kept one is kept; 0.25 by chance."""
        mask = kept(color, batch_size=200)[1]
        return (mask & mask.roll(-1, 2)).sum() / mask.sum()

    assert neighbors("red") > 0.6
    assert neighbors("green") > 0.5
    assert neighbors("purple") < 0.25
    assert neighbors("blue") < 0.2


def test_every_patch_is_kept_as_often():
    shares = kept("green", batch_size=4000, side=6)[1].float().mean(dim=0)
    assert (shares - 0.25).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list_maskings())
def test_noise_may_have_any_float_dtype(name, dtype):
    noise = torch.arange(16).reshape(1, 16) * 5 % 16 / 16  # exact in each
    found = [
        create_masking(name)(
            PatchInputs(torch.zeros(1, 3, 16, 16), 4, noise=each, attention=noise)
        ).index
        for each in (noise, noise.to(dtype))
    ]
    assert torch.equal(*found)


def test_noise_is_below_1_as_float32_too():
    pixels, noise = torch.zeros(1, 3, 16, 16), torch.full((1, 16), 1 - 1e-12, dtype=torch.float64)
    assert PatchInputs(pixels, 4, noise=noise).noise.max() < 1
