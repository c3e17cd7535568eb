import numpy as np
import pytest
import torch

from clip_pgs import PatchInputs, create_masking
from clip_pgs.masking.grid import nearest_rectangle
from clip_pgs.masking.patches import kept_patches


def draw(count, *, height, width, mask_ratio):
    """Return which patches are kept, (count, height, width)."""
    noise = torch.rand(count, height * width, generator=torch.Generator().manual_seed(0))
    images = torch.zeros(1, 3, 2 * height, 2 * width).expand(count, -1, -1, -1)
    strategy = create_masking("block", mask_ratio=mask_ratio)
    selection = strategy(PatchInputs(images, 2, noise=noise))
    return kept_patches(selection, height * width).reshape(count, height, width)


def bounding_box(image):
    rows, columns = np.nonzero(image.numpy())
    return np.ptp(rows) + 1, np.ptp(columns) + 1


def test_at_three_quarters_a_square_of_half_the_side_stays():
    for image in draw(20, height=14, width=14, mask_ratio=0.75):
        assert bounding_box(image) == (7, 7)


def test_a_block_that_is_too_large_is_trimmed_inside():
    for image in draw(20, height=14, width=14, mask_ratio=0.5):
        assert bounding_box(image) == (10, 10)
        assert image.sum() == 98


def test_a_block_that_is_too_small_is_filled_outside():
    # Seven of sixteen patches: 3 x 2, and one more anywhere.
    kept = draw(200, height=4, width=4, mask_ratio=9 / 16)
    for image in kept:
        blocks = image.unfold(0, 3, 1).unfold(1, 2, 1).flatten(2)
        assert blocks.all(dim=2).any()
        assert image.sum() == 7
    assert kept.any(dim=0).all()


def test_every_place_is_equally_likely():
    kept = draw(9000, height=4, width=4, mask_ratio=0.75)
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
