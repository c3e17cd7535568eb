import math

import numpy as np
import pytest
import scipy.stats
import torch

from clip_pgs import PatchInputs, create_masking
from clip_pgs.masking.baselines import nearest_rectangle
from clip_pgs.masking.sampling import kept_patches


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


def draw(name, count, *, height, width, **options):
    """Return which patches of `count` images are kept, (count, height, width)."""
    noise = noise_like(count, height * width)
    images = torch.zeros(1, 3, 2 * height, 2 * width).expand(count, -1, -1, -1)
    selection = create_masking(name, **options)(PatchInputs(images, 2, noise=noise))
    return kept_patches(selection, height * width).reshape(count, height, width)


def noise_like(batch_size, num_patches):
    return torch.rand(batch_size, num_patches, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["random", "gaussian", "grid", "block"])
@pytest.mark.parametrize(("ratio", "expected"), [(0.5, 98), (0.3, 138), (0.75, 49), (0.0, 196)])
def test_exactly_the_stated_count_is_kept(name, ratio, expected):
    kept = draw(name, 3, height=14, width=14, mask_ratio=ratio)
    assert kept.sum(dim=(1, 2)).tolist() == [expected] * 3


def test_it_keeps_the_largest_gumbel_numbers_plus_log_weights():
    kept = draw("gaussian", 50, height=3, width=4, mask_ratio=0.5, rule="weights").flatten(1)
    keys = -np.log(-np.log(noise_like(50, 12).double().numpy())) + np.log(weights_by_hand(3, 4))
    for i in range(50):
        expected = sorted(np.argsort(-keys[i])[:6].tolist())
        assert kept[i].nonzero().flatten().tolist() == expected


@pytest.mark.parametrize("sigma", [0.2, 0.5])
def test_a_single_patch_is_kept_as_often_as_its_weight(sigma):
    options = {"mask_ratio": 11 / 12, "rule": "weights", "sigma": sigma}
    kept = draw("gaussian", 40_000, height=3, width=4, **options).flatten(1)
    weights = weights_by_hand(3, 4, sigma=sigma)
    share = weights / weights.sum()
    # Five standard deviations of a binomial share.
    deviation = 5 * np.sqrt(share * (1 - share) / 40_000)
    assert (np.abs(kept.float().mean(dim=0).numpy() - share) <= deviation).all()


def test_as_released_it_keeps_the_largest_uniform_numbers_plus_density():
    kept = draw("gaussian", 50, height=5, width=4, mask_ratio=0.5).flatten(1)
    density = [
        scipy.stats.multivariate_normal.pdf((y, x), mean=(0, 0), cov=0.2 * np.eye(2))
        for y in np.linspace(-1, 1, 5)
        for x in np.linspace(-1, 1, 4)
    ]
    keys = noise_like(50, 20).double().numpy() + np.array(density)
    for i in range(50):
        expected = sorted(np.argsort(-keys[i])[:10].tolist())
        assert kept[i].nonzero().flatten().tolist() == expected


def test_as_released_a_corner_is_kept_about_three_times_in_ten():
    frequency = draw("gaussian", 4000, height=14, width=14, mask_ratio=0.5).float().mean(dim=0)
    corners = frequency[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
    # SPEC: 0.301; the mean of 16,000 draws has a standard deviation of 0.004.
    assert corners == pytest.approx(0.301, abs=0.015)
    assert frequency[6:8, 6:8].min() > 0.99


def test_a_sigma_without_its_rule_is_refused():
    with pytest.raises(ValueError, match="sigma goes with rule=weights, got rule=released"):
        create_masking("gaussian", sigma=0.3)
    with pytest.raises(ValueError, match="rule must be one of released, weights, got 'paper'"):
        create_masking("gaussian", rule="paper")


def test_the_middle_is_kept_more_often_than_the_corners():
    options = {"mask_ratio": 0.5, "rule": "weights"}
    frequency = draw("gaussian", 2000, height=7, width=7, **options).float().mean(dim=0)
    assert frequency[3, 3] > 0.95
    assert frequency[0, 0] < 0.1


def test_a_wide_gaussian_is_nearly_uniform():
    kept = draw("gaussian", 4000, height=3, width=4, mask_ratio=0.5, rule="weights", sigma=50.0)
    np.testing.assert_allclose(kept.float().mean(dim=0).numpy(), 0.5, atol=0.04)


def test_a_sigma_out_of_its_range_is_refused():
    with pytest.raises(ValueError, match=r"sigma must be in .*, got 0\.0"):
        create_masking("gaussian", sigma=0.0)


def test_at_three_quarters_one_patch_of_each_two_by_two_stays():
    windows = draw("grid", 20, height=14, width=14, mask_ratio=0.75).reshape(20, 7, 2, 7, 2)
    assert (windows.sum(dim=(2, 4)) == 1).all()


def test_the_kept_patch_has_one_place_in_all_windows_of_an_image():
    windows = draw("grid", 20, height=4, width=6, mask_ratio=0.75).reshape(20, 2, 2, 3, 2)
    assert (windows == windows[:, :1, :, :1]).all()


def test_each_of_the_four_places_is_equally_likely():
    kept = draw("grid", 8000, height=4, width=4, mask_ratio=0.75)
    # Binomial standard deviation 0.0048; five of them.
    np.testing.assert_allclose(kept.float().mean(dim=0).numpy(), 0.25, atol=0.025)


@pytest.mark.parametrize(
    ("height", "width", "mask_ratio", "grid"),
    [(14, 14, 0.5, (10, 10)), (14, 14, 0.3, (12, 12)), (6, 9, 0.5, (4, 7)), (1, 12, 0.5, (1, 6))],
)
def test_other_ratios_thin_evenly_spaced_lines_out(height, width, mask_ratio, grid):
    # Both sums count lines with a kept patch, all of them where the grid was trimmed.
    kept = draw("grid", 30, height=height, width=width, mask_ratio=mask_ratio)
    assert kept.any(dim=2).sum(dim=1).tolist() == [grid[0]] * 30
    assert kept.any(dim=1).sum(dim=1).tolist() == [grid[1]] * 30


def test_kept_lines_are_evenly_spaced():
    lines = draw("grid", 40, height=14, width=14, mask_ratio=0.5).any(dim=2)
    for image in lines.tolist():
        positions = [row for row in range(14) if image[row]]
        gaps = [b - a for a, b in zip(positions, [*positions[1:], positions[0] + 14], strict=True)]
        # Ten of fourteen lines on a ring: steps of 1 or 2, and never two of 2 in a row.
        assert sorted(gaps) == [1] * 6 + [2] * 4
        assert (2, 2) not in list(zip(gaps, gaps[1:] + gaps[:1], strict=True))


def test_a_grid_that_is_too_small_is_filled_at_random():
    kept = draw("grid", 4000, height=3, width=3, mask_ratio=1 / 3)
    # 2 x 3 is the grid of six; every patch is kept equally often.
    np.testing.assert_allclose(kept.float().mean(dim=0).numpy(), 2 / 3, atol=0.04)
    assert (kept.sum(dim=(1, 2)) == 6).all()


def bounding_box(image):
    rows, columns = np.nonzero(image.numpy())
    return np.ptp(rows) + 1, np.ptp(columns) + 1


def test_at_three_quarters_a_square_of_half_the_side_stays():
    for image in draw("block", 20, height=14, width=14, mask_ratio=0.75):
        assert bounding_box(image) == (7, 7)


def test_a_block_that_is_too_large_is_trimmed_inside():
    for image in draw("block", 20, height=14, width=14, mask_ratio=0.5):
        assert bounding_box(image) == (10, 10)
        assert image.sum() == 98


def test_a_block_that_is_too_small_is_filled_outside():
    # Seven of sixteen patches: 3 x 2, and one more anywhere.
    kept = draw("block", 200, height=4, width=4, mask_ratio=9 / 16)
    for image in kept:
        blocks = image.unfold(0, 3, 1).unfold(1, 2, 1).flatten(2)
        assert blocks.all(dim=2).any()
        assert image.sum() == 7
    assert kept.any(dim=0).all()


def test_every_place_is_equally_likely():
    kept = draw("block", 9000, height=4, width=4, mask_ratio=0.75)
    top_left = torch.stack(
        [
            kept[:, row : row + 2, column : column + 2].all(dim=(1, 2)).float()
            for row in range(3)
            for column in range(3)
        ],
        dim=1,
    )
    assert (top_left.sum(dim=1) == 1).all()
    # Binomial standard deviation 0.0033; five of them.
    np.testing.assert_allclose(top_left.mean(dim=0).numpy(), 1 / 9, atol=0.017)


@pytest.mark.parametrize(
    ("grid_size", "count", "expected"),
    [
        ((14, 14), 98, (10, 10)),
        ((14, 14), 49, (7, 7)),
        ((14, 14), 138, (12, 12)),
        ((1, 12), 6, (1, 6)),
        ((12, 1), 6, (6, 1)),
        ((8, 4), 8, (4, 2)),
        ((3, 3), 9, (3, 3)),
        ((5, 5), 1, (1, 1)),
    ],
)
def test_the_nearest_rectangle_has_the_proportions_of_the_grid(grid_size, count, expected):
    assert nearest_rectangle(grid_size, count) == expected
