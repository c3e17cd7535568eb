import pytest
import torch

from clip_pgs import create_masking
from clip_pgs.masking.pgs import PGSMasking
from support.images import make_inputs


@pytest.mark.parametrize(
    ("grid_size", "side", "window"),
    [((6, 7), 0.5, (3, 4)), ((4, 4), 0.75, (3, 3)), ((5, 3), 1.0, (5, 3)), ((4, 2), 0.1, (1, 1))],
)
def test_it_keeps_the_window_with_the_lowest_sum_of_scores(grid_size, side, window):
    noise = torch.rand(4, grid_size[0] * grid_size[1], generator=torch.Generator().manual_seed(0))
    inputs = make_inputs(4, grid_size=grid_size, noise=noise, progress=0.5)
    selection = create_masking("saliency-crop", side=side)(inputs)
    assert selection.window == window
    assert selection.valid is None
    scores = PGSMasking().steps(inputs, noise).scores.reshape(4, *grid_size)
    for kept, image in zip(selection.index.tolist(), scores, strict=True):
        sums = {
            (top, left): image[top : top + window[0], left : left + window[1]].double().sum()
            for top in range(grid_size[0] - window[0] + 1)
            for left in range(grid_size[1] - window[1] + 1)
        }
        top, left = min(sums, key=sums.get)
        assert kept == [
            row * grid_size[1] + column
            for row in range(top, top + window[0])
            for column in range(left, left + window[1])
        ]


@pytest.mark.parametrize("side", [0, -0.5, 1.5])
def test_a_side_out_of_range_is_refused(side):
    with pytest.raises(ValueError, match=r"side must be in \(0, 1\]"):
        create_masking("saliency-crop", side=side)


def test_there_is_no_mask_ratio():
    with pytest.raises(ValueError, match="SaliencyCropMasking has no mask ratio"):
        create_masking("saliency-crop").set_mask_ratio(0.5)
