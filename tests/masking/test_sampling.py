import math

import pytest
import torch

from clip_pgs.masking.sampling import draw_noise, gumbel, mask_top, mask_top_counts, select_top
from support.images import make_inputs


def test_select_top_keeps_the_highest_in_raster_order():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.7]])
    assert select_top(scores, num_keep=2).index.tolist() == [[1, 3]]


def test_mask_top_drops_the_highest_and_ties_go_to_the_lower_index():
    scores = torch.tensor([[0.5, 0.9, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]])
    assert mask_top(scores, num_mask=2).index.tolist() == [[2, 3], [2, 3]]


def test_mask_top_counts_drops_each_rows_own_number():
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.4, 0.3, 0.2, 0.1]])
    selection = mask_top_counts(scores, num_mask=torch.tensor([1, 3]), num_mask_min=1)
    assert selection.index.tolist() == [[0, 2, 3], [3, 3, 3]]
    assert selection.valid.tolist() == [[True, True, True], [True, False, False]]


def test_noise_is_uniform_in_the_unit_interval():
    inputs = make_inputs(64, grid_size=(10, 10))
    noise = draw_noise(inputs, torch.Generator().manual_seed(0))
    assert noise.shape == (64, 100)
    assert 0.0 <= noise.min() < 0.01
    assert 0.99 < noise.max() < 1.0
    assert noise.mean().item() == pytest.approx(0.5, abs=0.01)


def test_gumbel_has_its_mean_and_stays_finite_at_zero():
    values = gumbel(torch.rand(200_000, generator=torch.Generator().manual_seed(0)))
    assert values.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert values.std().item() == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    assert torch.isfinite(gumbel(torch.tensor([0.0, 1.0 - 2**-24]))).all()
