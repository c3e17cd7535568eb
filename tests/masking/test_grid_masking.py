import numpy as np
import pytest
import torch

from clip_pgs import PatchInputs, create_masking
from clip_pgs.masking.patches import kept_patches


def draw(count, *, height, width, mask_ratio, seed=0):
    """Return which patches are kept, (count, height, width)."""
    noise = torch.rand(count, height * width, generator=torch.Generator().manual_seed(seed))
    images = torch.zeros(1, 3, 2 * height, 2 * width).expand(count, -1, -1, -1)
    strategy = create_masking("grid", mask_ratio=mask_ratio)
    selection = strategy(PatchInputs(images, 2, noise=noise))
    return kept_patches(selection, height * width).reshape(count, height, width)


def test_at_three_quarters_one_patch_of_each_two_by_two_stays():
    windows = draw(20, height=14, width=14, mask_ratio=0.75).reshape(20, 7, 2, 7, 2)
    assert (windows.sum(dim=(2, 4)) == 1).all()


def test_the_kept_patch_has_one_place_in_all_windows_of_an_image():
    windows = draw(20, height=4, width=6, mask_ratio=0.75).reshape(20, 2, 2, 3, 2)
    assert (windows == windows[:, :1, :, :1]).all()


def test_each_of_the_four_places_is_equally_likely():
    kept = draw(8000, height=4, width=4, mask_ratio=0.75)
    # Binomial standard deviation 0.0048; five of them.
    np.testing.assert_allclose(kept.float().mean(dim=0).numpy(), 0.25, atol=0.025)


@pytest.mark.parametrize(
    ("height", "width", "mask_ratio", "grid"),
    [(14, 14, 0.5, (10, 10)), (14, 14, 0.3, (12, 12)), (6, 9, 0.5, (4, 7)), (1, 12, 0.5, (1, 6))],
)
def test_other_ratios_thin_evenly_spaced_lines_out(height, width, mask_ratio, grid):
    # Both sums count lines with a kept patch, all of them where the grid was trimmed.
    kept = draw(30, height=height, width=width, mask_ratio=mask_ratio)
    assert kept.any(dim=2).sum(dim=1).tolist() == [grid[0]] * 30
    assert kept.any(dim=1).sum(dim=1).tolist() == [grid[1]] * 30


def test_kept_lines_are_evenly_spaced():
    lines = draw(40, height=14, width=14, mask_ratio=0.5).any(dim=2)
    for image in lines.tolist():
        positions = [row for row in range(14) if image[row]]
        gaps = [b - a for a, b in zip(positions, [*positions[1:], positions[0] + 14], strict=True)]
        # Ten of fourteen lines on a ring: steps of 1 or 2, and never two of 2 in a row.
        assert sorted(gaps) == [1] * 6 + [2] * 4
        assert (2, 2) not in list(zip(gaps, gaps[1:] + gaps[:1], strict=True))


def test_a_grid_that_is_too_small_is_filled_at_random():
    kept = draw(4000, height=3, width=3, mask_ratio=1 / 3)
    # 2 x 3 is the grid of six; every patch is kept equally often.
    np.testing.assert_allclose(kept.float().mean(dim=0).numpy(), 2 / 3, atol=0.04)
    assert (kept.sum(dim=(1, 2)) == 6).all()
