import math

import numpy as np
import pytest
import torch

from clip_pgs import PatchInputs, create_masking
from clip_pgs.masking.patches import kept_patches


def weights_by_hand(height, width, *, sigma=0.2):
    """Return the Gaussian at the centre of each patch, sides of length 1."""
    return np.array(
        [
            math.exp(-(((row + 0.5) / height - 0.5) ** 2) / (2 * sigma**2))
            * math.exp(-(((column + 0.5) / width - 0.5) ** 2) / (2 * sigma**2))
            for row in range(height)
            for column in range(width)
        ]
    )


def draw(count, *, height=3, width=4, **options):
    """Return which patches of `count` images are kept, (count, N)."""
    noise = torch.rand(count, height * width, generator=torch.Generator().manual_seed(0))
    images = torch.zeros(1, 3, 2 * height, 2 * width).expand(count, -1, -1, -1)
    strategy = create_masking("gaussian", **options)
    return noise, kept_patches(strategy(PatchInputs(images, 2, noise=noise)), height * width)


def test_it_keeps_the_largest_gumbel_numbers_plus_log_weights():
    noise, kept = draw(50, mask_ratio=0.5)
    keys = -np.log(-np.log(noise.double().numpy())) + np.log(weights_by_hand(3, 4))
    for i in range(50):
        expected = sorted(np.argsort(-keys[i])[:6].tolist())
        assert kept[i].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("sigma", [0.2, 0.5])
def test_a_single_patch_is_kept_as_often_as_its_weight(sigma):
    _, kept = draw(40_000, mask_ratio=11 / 12, sigma=sigma)
    weights = weights_by_hand(3, 4, sigma=sigma)
    share = weights / weights.sum()
    # Five standard deviations of a binomial share.
    deviation = 5 * np.sqrt(share * (1 - share) / 40_000)
    assert (np.abs(kept.float().mean(dim=0).numpy() - share) <= deviation).all()


def test_the_middle_is_kept_more_often_than_the_corners():
    _, kept = draw(2000, height=7, width=7, mask_ratio=0.5)
    frequency = kept.float().mean(dim=0).reshape(7, 7)
    assert frequency[3, 3] > 0.95
    assert frequency[0, 0] < 0.1


def test_a_wide_gaussian_is_nearly_uniform():
    _, kept = draw(4000, mask_ratio=0.5, sigma=50.0)
    np.testing.assert_allclose(kept.float().mean(dim=0).numpy(), 0.5, atol=0.04)


def test_a_sigma_out_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"sigma must be in .*, got 0\.0"):
        create_masking("gaussian", sigma=0.0)
