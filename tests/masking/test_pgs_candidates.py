"""Which patches PGS draws as candidates: how many, how often, and from where."""

import numpy as np
import pytest
import torch

from clip_pgs import PatchInputs, create_masking
from clip_pgs.masking.patches import kept_patches
from masking import oracle
from support.images import make_inputs, smooth_images

GRID = (7, 5)
BORDER = [j for j in range(35) if j // 5 in (0, 6) or j % 5 in (0, 4)]


@pytest.mark.parametrize(("num_patches", "expected"), [(196, 10), (64, 3), (8, 1), (4, 1)])
def test_candidates_are_five_percent_and_at_least_one(num_patches, expected):
    # With transport and edges off and a threshold above every score, candidates alone are masked.
    strategy = create_masking(
        "pgs", mask_ratio=0.9, mask_ratio_min=0.0, edges=False, transport=False, threshold=2.0
    )
    inputs = PatchInputs(torch.randn(3, 3, 4, 4 * num_patches), 4)
    assert (num_patches - strategy(inputs).kept_counts()).tolist() == [expected] * 3


def candidate_frequency(**options):
    strategy = create_masking(
        "pgs", mask_ratio=0.9, mask_ratio_min=0.0, threshold=9.0, candidate_ratio=0.1, **options
    )
    image = smooth_images(1, height=32, width=40)
    noise = torch.rand(3000, 20, generator=torch.Generator().manual_seed(0))
    selection = strategy(PatchInputs(image.expand(3000, -1, -1, -1), 8, noise=noise))
    drawn = ~kept_patches(selection, 20)
    return drawn.float().mean(dim=0).numpy(), oracle.edge_map(image[0].double().numpy(), 8)


def test_without_protection_candidates_are_uniform():
    frequency, _ = candidate_frequency(edge_protection=0.0)
    # Binomial standard deviation 0.0055; four of them.
    np.testing.assert_allclose(frequency, 0.1, atol=0.022)


def test_strong_edges_are_rarely_candidates():
    frequency, edges = candidate_frequency()
    assert frequency[edges.argmax()] < 0.02
    assert frequency[edges.argmin()] > 0.1


def test_without_edges_candidates_are_uniform_whatever_the_protection():
    frequency, _ = candidate_frequency(edges=False, edge_protection=50.0)
    np.testing.assert_allclose(frequency, 0.1, atol=0.022)


def inputs_with_noise(**changes):
    noise = torch.rand(2, 35, generator=torch.Generator().manual_seed(4))
    return make_inputs(2, grid_size=GRID, noise=noise, **changes)


def border_candidates(inputs, **options):
    strategy = create_masking("pgs", candidate_region="border", **options)
    return strategy.steps(inputs, inputs.noise).candidate_index


@pytest.mark.parametrize("protection", [0.0, 4.0, 50.0])
@pytest.mark.parametrize(("ratio", "count"), [(0.02, 1), (0.2, 7), (0.4, 14), (0.7, 24), (1, 35)])
def test_candidates_of_the_border_equal_a_slow_loop_and_others_follow(ratio, count, protection):
    # 20 of the 35 patches lie on the border.
    inputs = inputs_with_noise()
    found = border_candidates(inputs, candidate_ratio=ratio, edge_protection=protection)
    for i in range(2):
        edges = oracle.edge_map(inputs.pixels[i].double().numpy(), 8)
        expected = oracle.candidates(
            inputs.noise[i], edges, protection=protection, count=count, places=BORDER
        )
        assert sorted(found[i].tolist()) == sorted(expected)
        assert (set(expected) <= set(BORDER)) == (count <= 20)


def test_the_luckiest_patch_inside_comes_after_the_unluckiest_of_the_border():
    # The largest and the smallest number that a float32 draw gives.
    inputs = make_inputs(1, grid_size=GRID, noise=torch.full((1, 35), 1 - 2**-24))
    inputs.noise[0, BORDER] = 0.0
    options = {"candidate_ratio": 20 / 35, "edge_protection": 30.0, "center_weight": 3.0}
    assert sorted(border_candidates(inputs, **options)[0].tolist()) == BORDER


def test_every_patch_of_the_border_is_as_likely_without_protection():
    noise = torch.rand(4000, 35, generator=torch.Generator().manual_seed(0))
    inputs = make_inputs(1, grid_size=GRID)
    pixels = inputs.pixels.expand(4000, -1, -1, -1)
    found = border_candidates(PatchInputs(pixels, 8, noise=noise), edges=False, candidate_ratio=0.1)
    frequency = torch.bincount(found.flatten(), minlength=35) / 4000
    # Four of 20; binomial standard deviation 0.0063.
    expected = [0.2 if j in BORDER else 0.0 for j in range(35)]
    np.testing.assert_allclose(frequency, expected, atol=0.026)


def test_on_a_single_row_every_patch_is_on_the_border():
    inputs = make_inputs(3, grid_size=(1, 12))
    chosen = [
        create_masking("pgs", candidate_ratio=0.3, candidate_region=region)(
            inputs, generator=torch.Generator().manual_seed(1)
        )
        for region in ("border", "image")
    ]
    assert torch.equal(chosen[0].index, chosen[1].index)


def test_candidates_of_the_border_are_masked_first():
    inputs = inputs_with_noise()
    kept = kept_patches(
        create_masking("pgs", mask_ratio=0.2, candidate_ratio=0.2, candidate_region="border")(
            inputs
        ),
        35,
    )
    drawn = border_candidates(inputs, candidate_ratio=0.2)
    assert kept.sum(dim=1).tolist() == [28, 28]
    assert not kept.gather(1, drawn).any()


def test_an_unknown_region_is_refused():
    sentence = "candidate_region must be one of image, border, got 'edge'"
    with pytest.raises(ValueError, match=sentence):
        create_masking("pgs", candidate_region="edge")
